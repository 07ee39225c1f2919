"""Backward launcher: states again, the query side, a reverse scan over stretches, the key side."""

from __future__ import annotations

import torch
import triton
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


def incoming_gradients(call: args.Inputs, pull: Tensor, G: Tensor, F) -> tuple[Tensor, Tensor]:
    """(dL0, dR0) from the reverse state before the first token; 0 where nothing was held."""
    empty = call.L0 == -torch.inf
    dR0 = G[:, : F.MARKS, : F.DIM_V].reshape(call.R0.shape)
    dR0 = dR0.masked_fill(empty.unsqueeze(-1), 0.0)
    held = call.R0.masked_fill(empty.unsqueeze(-1), 0.0)
    dL0 = (dR0 * held).sum(-1) - pull[:, : F.MARKS].reshape(empty.shape)
    return dL0.masked_fill(empty, 0.0), dR0


def causal_sweep(call: args.Inputs, dout: Tensor, dL, dR, wide: bool) -> dict[str, Tensor]:
    """All gradients of one slice of the columns of values; those of tokens float32 if `wide`."""
    query, key, value = call.query, call.key, call.value
    pairs = key.shape[0] * key.shape[1]
    stretches = args.cut(call, configs.BACKWARD_SPAN, key.shape[2])
    saved, ends = start_states(call, stretches)
    configs_of = {pass_: args.choose_config(pass_, call) for pass_ in ("rows", "keys")}
    F = args.features(call, configs_of["rows"])
    chunks = triton.cdiv(configs.BACKWARD_SPAN, configs_of["keys"].chunk)
    dtype = torch.bfloat16 if F.BFLOAT16 else torch.float32
    bytes_of_a_stretch = F.BLOCKS_D * chunks * F.PAD_M * F.PAD_V * dtype.itemsize
    units = configs.stretches_of_a_program(pairs * stretches.count, bytes_of_a_stretch)
    problem = args.problem_of(call, stretches, F.BLOCKS_D, units)
    grads = args.new_token_gradients(call, wide)
    reverse = new_reverse(query, pairs * stretches.count, F)
    rows = new_row_partials(query, pairs, problem.groups, F)
    keys = new_key_partials(query, pairs, problem.groups, F)
    rises = args.new_rises(call, stretches)
    pull, G = outgoing(call, ends, dL, dR, F)
    programs = pairs * problem.groups * problem.parts
    scratch = args.new_states(call, programs * chunks, F, dtype)
    inputs = (query, key, value, dout)
    inputs += tuple(strides(x) for x in inputs)

    def launch(kernel, pass_: str, outputs: tuple, buffers: tuple) -> None:
        config = configs_of[pass_]
        for takes in configs.launches(pass_, config.shares):
            columns = takes.get("TAKES_QUERIES", False) or takes.get("TAKES_KEYS", False)
            own = problem if columns else problem._replace(parts=1)
            for pieces in (False, True):
                kernel[(pairs * own.groups * own.parts,)](
                    *inputs[:4], *outputs, *inputs[4:], call.marks, call.keep, saved,
                    reverse, rises, *buffers, stretches.table, *own,
                    args.features(call, config, STEEP=pieces, **takes), **config.options,
                )  # fmt: skip

    with on_device(query):
        launch(rows_kernel, "rows", (grads["query"],), (rows,))
        reverse_scan(call, reverse, pull, G, stretches, problem, F)
        launch(keys_kernel, "keys", (grads["key"], grads["value"]), (scratch, keys))
    grads |= parameter_gradients(call, rows, keys, F)
    if call.L0 is not None:
        grads["L0"], grads["R0"] = incoming_gradients(call, pull, G, F)
    return grads
