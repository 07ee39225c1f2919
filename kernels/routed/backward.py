"""Backward pass: Delta, then dK and dV, then dQ."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from flashmark.block_sparse.call import Saved as Rows
from flashmark.routed import eager
from flashmark.routed.call import Call, Grads, Saved

from ..block_sparse.arguments import WIDE, on_device, strides
from ..block_sparse.backward import row_sums
from ..block_sparse.backward_kv import Operands
from . import arguments as args
from .arguments import Sizes
from .backward_keys import gathered_keys_kernel, near_keys_kernel
from .backward_queries import gathered_queries_kernel, near_queries_kernel
from .lists import Lists, sort_choices

SHARE = 1024  # rows that one program gathers for dK and dV, where several add to a block


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of `forward`.

    In a deterministic call one program adds up dK and dV of a block, in a fixed order; otherwise
    programs share the queries that chose it evenly and add through float32 atomics.
    """
    query, key, value = call.query, call.key, call.value
    if not query.numel() or not key.numel():
        return eager.backward(call, saved, dout, dlse)  # nothing to launch
    described = args.describe(call)
    if dout.stride(-1) != 1 or dout.stride(2) >= WIDE:
        dout = dout.contiguous()
    chunks, lists = [described.sizes], [None]
    with on_device(query):
        rows = Rows(saved.out, saved.lse, saved.lse.new_empty(0))
        delta, lse, dsinks = row_sums(dout, dlse, rows, described.modifiers.sinks)
        operands = Operands(
            query, key, value, dout, lse, delta,
            strides(query), strides(key), strides(value), strides(dout),
        )  # fmt: skip
        if described.far:
            chunks = described.chunks(query.shape[0], query.shape[3], 4)
            lists = sort_choices(call.indices, described, chunks)
        dkey, dvalue = _keys_and_values(operands, call, described, chunks, lists)
        dquery = _queries(operands, call, described, chunks, lists)
    return Grads(dquery, dkey, dvalue, dsinks)


def _keys_and_values(
    operands: Operands, call: Call, described: args.KernelArguments, chunks: list[Sizes],
    lists: list[Lists],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    key, value = operands.key, operands.value
    (batch, kv_heads, kv_len, _), size = key.shape, call.block_size
    dtype = torch.float32 if described.far else key.dtype
    dkey, dvalue = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    features, config = described.fit("keys", key, ATOMIC=not call.deterministic)
    near = dataclasses.replace(features, ATOMIC=False)
    near_keys_kernel[(batch * kv_heads * triton.cdiv(kv_len, features.BLOCK_N),)](
        operands, dkey, dvalue, described.modifiers, call.scale, *described.sizes, F=near,
        **config.options,
    )  # fmt: skip
    if not described.far:
        return dkey, dvalue
    blocks = kv_len // size
    bounds = torch.arange(0, (blocks + 1) * size, size, dtype=torch.int32, device=key.device)
    bounds = bounds.expand(batch * kv_heads, -1).contiguous()
    share = max(1, SHARE // features.GROUP)
    for sizes, chosen in zip(chunks, lists, strict=True):
        offsets = torch.searchsorted(chosen.ordered, bounds, out_int32=True)
        lines = triton.cdiv(sizes.chunk * sizes.top, share) if features.ATOMIC else blocks
        gathered_keys_kernel[(batch * kv_heads * lines * features.PARTS,)](
            operands, chosen, offsets, dkey, dvalue, described.modifiers, call.scale, share,
            *sizes, F=features, **config.options,
        )  # fmt: skip
    return dkey.to(key.dtype), dvalue.to(value.dtype)


def _queries(
    operands: Operands, call: Call, described: args.KernelArguments, chunks: list[Sizes],
    lists: list[Lists | None],
) -> Tensor:  # fmt: skip
    query = operands.query
    batch, heads, _, dim = query.shape
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    features, config = described.fit("queries", query)
    part = None
    if described.far:
        shape = batch, heads, chunks[0].chunk, described.sizes.top, dim
        part = torch.empty(shape, dtype=torch.float32, device=query.device)
    for sizes, chosen in zip(chunks, lists, strict=True):
        if chosen is not None:
            tiles = triton.cdiv(sizes.chunk * sizes.top * features.GROUP, features.BLOCK_M)
            gathered_queries_kernel[(batch * sizes.heads * tiles,)](
                operands, chosen, part, described.modifiers, *sizes, F=features, **config.options
            )
        near_queries_kernel[(batch * heads * triton.cdiv(sizes.chunk, features.BLOCK_M),)](
            operands, chosen, part, dquery, described.modifiers, call.scale, *sizes, F=features,
            **config.options,
        )  # fmt: skip
    return dquery
