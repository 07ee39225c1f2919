"""Backward launcher: states again, the query side, a reverse scan over slots, the key side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_sparse.arguments import on_device, strides
from . import arguments as args
from . import configs
from .backward_keys import keys_kernel
from .backward_rows import rows_kernel
from .gradients import (
    new_key_partials,
    new_reverse,
    new_row_partials,
    outgoing,
    parameter_gradients,
    reverse_scan,
)
from .states import start_states


def incoming_gradients(call: args.Call, pull: Tensor, G: Tensor, F) -> tuple[Tensor, Tensor]:
    """(dL0, dR0) from the reverse state before the first token; 0 where nothing was held."""
    empty = call.L0 == -torch.inf
    dR0 = G[:, : F.DIM_V, : F.MARKS].mT.reshape(call.R0.shape)
    dR0 = dR0.masked_fill(empty.unsqueeze(-1), 0.0)
    held = call.R0.masked_fill(empty.unsqueeze(-1), 0.0)
    dL0 = (dR0 * held).sum(-1) - pull[:, : F.MARKS].reshape(empty.shape)
    return dL0.masked_fill(empty, 0.0), dR0


def causal_sweep(call: args.Call, dout: Tensor, dL, dR, wide: bool) -> dict[str, Tensor | None]:
    """All gradients of a call whose values fit one block; token gradients in float32 if `wide`."""
    query, key, value = call.query, call.key, call.value
    pairs = key.shape[0] * key.shape[1]
    slots = args.cut(call, configs.BACKWARD_SPAN, key.shape[2])
    saved, ends = start_states(call, slots)
    row_config, key_config = (args.choose_config(x, call) for x in ("rows", "keys"))
    row_F, key_F = (args.features(call, x) for x in (row_config, key_config))
    units = configs.slots_of_a_program(pairs * slots.count)
    problem = args.problem_of(call, slots, row_F.BLOCKS_D, units)
    grads = args.new_token_gradients(call, wide)
    reverse = new_reverse(query, pairs * slots.count, row_F)
    rows = new_row_partials(query, pairs, problem.groups, row_F)
    keys = new_key_partials(query, pairs, problem.groups, key_F)
    token_strides = tuple(strides(x) for x in (query, key, value, dout))
    pull, G = outgoing(call, ends, dL, dR, row_F)
    grid = (pairs * problem.groups * problem.parts,)
    with on_device(query):
        rows_kernel[grid](
            query, key, value, dout, grads["query"], *token_strides, call.marks, call.keep, saved,
            reverse, rows, slots.table, problem, row_F,
            num_warps=row_config.num_warps, num_stages=row_config.num_stages,
        )  # fmt: skip
        reverse_scan(call, reverse, pull, G, slots, problem, row_F)
        keys_kernel[grid](
            query, key, value, dout, grads["key"], grads["value"], *token_strides, call.marks,
            call.keep, saved, reverse, keys, slots.table, problem, key_F,
            num_warps=key_config.num_warps, num_stages=key_config.num_stages,
        )  # fmt: skip
    grads |= parameter_gradients(call, rows, keys, row_F)
    if call.L0 is not None:
        grads["L0"], grads["R0"] = incoming_gradients(call, pull, G, row_F)
    return grads
