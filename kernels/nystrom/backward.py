"""Backward launcher: states again, the query side, a reverse scan over stretches, the key side."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..block_sparse.arguments import on_device, strides
from . import arguments as args
from . import configs
from .backward_keys import keys_kernel
from .backward_rows import rows_kernel
from .columns import through_half
from .gradients import (
    new_key_partials,
    new_reverse,
    new_row_partials,
    outgoing,
    parameter_gradients,
    reverse_scan,
)
from .slots import join_slots
from .states import slot_states


def incoming_gradients(call: args.Inputs, pull: Tensor, G: Tensor, F) -> tuple[Tensor, Tensor]:
    """(dL0, dR0) from the reverse state before the first token; 0 where nothing was held."""
    empty = call.L0 == -torch.inf
    dR0 = G[:, : F.MARKS, : F.DIM_V].reshape(call.R0.shape)
    dR0 = dR0.masked_fill(empty.unsqueeze(-1), 0.0)
    held = call.R0.masked_fill(empty.unsqueeze(-1), 0.0)
    dL0 = (dR0 * held).sum(-1) - pull.sum(1)[:, : F.MARKS].reshape(empty.shape)
    return dL0.masked_fill(empty, 0.0), dR0


def new_token_gradient(x: Tensor, heads: int, slices: int) -> Tensor:
    """Memory for shares of dQ or dK: (batch, key heads, slices, heads of a group, tokens, dim)."""
    batch, all_heads, tokens, dim = x.shape
    shape = batch, heads, slices, all_heads // heads, tokens, dim
    return x.new_empty(shape, dtype=torch.float32 if slices > 1 else x.dtype)


def causal_backward(
    call: args.Inputs, dout: Tensor, dL: Tensor | None, dR: Tensor | None
) -> dict[str, Tensor]:
    """All gradients. A column of the output depends on the same column of the values alone: where
    values are wider than a program holds, gradients of all else are sums over slices of columns.
    """
    query, key, value = call.query, call.key, call.value
    batch, heads, tokens, _ = key.shape
    pairs = batch * heads
    span, slot = configs.backward_span(query.device, pairs, tokens, call.marks.lq.shape[-2])
    stretches = args.cut(call, span, tokens)
    configs_of = {}
    for pass_ in ("states", "rows", "keys"):
        config = args.choose_config(pass_, call)
        configs_of[pass_] = dataclasses.replace(config, chunk=min(config.chunk, slot))
    F = args.features(call, configs_of["rows"], SLOT=slot)
    config = dataclasses.replace(configs_of["states"], block_v=F.BLOCK_V)
    stored, ends = slot_states(call, stretches, config, slot)
    units = configs.stretches_of_a_program(pairs * stretches.count)
    problem = args.problem_of(call, stretches, F.BLOCKS_D, units)
    lines = pairs * stretches.count
    dtype = torch.bfloat16 if F.BFLOAT16 else torch.float32
    reverse = new_reverse(query, lines, F)
    if not tokens:  # no slot, whose turn it would be to write them
        reverse.pull.zero_(), reverse.G.zero_(), reverse.ratio.fill_(1.0)
    reverse = reverse._replace(slots=new_reverse(query, lines * (span // slot), F, dtype))
    join_slots(call, stored, reverse, stretches, F)
    rows = new_row_partials(query, pairs, problem.groups, F)
    keys = new_key_partials(query, pairs, problem.groups, F)
    rises = args.new_rises(call, stretches, span // slot)
    pull, G = outgoing(call, ends, dL, dR, F)
    dq, dk = (new_token_gradient(x, heads, F.SLICES) for x in (query, key))
    dv = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    inputs = (query, key, value, dout)
    inputs += tuple(strides(x) for x in inputs)

    def launch(kernel, pass_: str, outputs: tuple, partials: tuple) -> None:
        whole = configs_of[pass_]
        pieces = dataclasses.replace(whole, chunk=min(whole.chunk, configs.BACKWARD_PIECE))
        for takes in configs.launches(pass_, whole.shares):
            columns = takes.get("TAKES_QUERIES", False) or takes.get("TAKES_KEYS", False)
            own = problem._replace(parts=F.SLICES * (F.BLOCKS_D if columns else 1))
            for config in (whole, pieces):
                features = args.features(call, config, SLOT=slot, STEEP=config is pieces, **takes)
                fixed = (features,)
                if pass_ == "rows":
                    some = config.chunk if F.SCAN else min(config.chunk, configs.BACKWARD_QUERIES)
                    fixed = dataclasses.replace(features, CHUNK=some), features
                kernel[(pairs * own.groups * own.parts,)](
                    *inputs[:4], *outputs, *inputs[4:], call.marks, call.keep, stored, reverse,
                    rises, partials, stretches.table, *own, *fixed, **config.options,
                )  # fmt: skip

    with on_device(query):
        launch(rows_kernel, "rows", (dq,), rows)
        reverse_scan(call, reverse, pull, G, stretches, problem, F)
        launch(keys_kernel, "keys", (dk, dv), keys)
    grads = {name: x.sum(2) if F.SLICES > 1 else x for name, x in (("query", dq), ("key", dk))}
    grads = {"query": grads["query"].view(query.shape), "key": grads["key"].view(key.shape)}
    grads |= {"value": dv} | parameter_gradients(call, rows, keys, F)
    if call.L0 is not None:
        grads["L0"], grads["R0"] = incoming_gradients(call, pull, G, F)
    return through_half(call, grads)
