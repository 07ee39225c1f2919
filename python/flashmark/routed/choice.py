"""`flashmark::choose_blocks`: the blocks of highest score, a tile of queries at a time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashmark.autograd import in_torch_func, transforms
from flashmark.library import overload, schema_of
from flashmark.routed.places import Places, places_of
from flashmark.routed.summaries import RoutedState, mean_over_heads, scores_of

NEG_INF = float("-inf")
TILE_ELEMENTS = 2**22  # scores of one tile of queries, all heads and landmarks


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One description of a choice of blocks; places as in `flashmark.routed.call.Call`."""

    query: Tensor  # (B, Hq, Nq, D)
    keys: Tensor  # (B, Hkv, C, M, D): of a RoutedState
    log_counts: Tensor  # (B, Hkv, C, M)
    top_k: int
    block_size: int
    near: int
    scale: float
    kv_len: int
    query_offset: Tensor | None = None  # int32 (1,) or (B,)
    starts: Tensor | None = None  # int32 (Nk,)
    base: Tensor | None = None  # int64 (Nk,): number of the first block of a token's sequence


def choose(call: Choice) -> Tensor:
    """int32 (B, Hkv, Nq, K): the chosen blocks, counted from the start of their sequence, best
    first and the lower block first of equal ones; -1 where there are fewer."""
    query, (batch, kv_heads, blocks, marks) = call.query, call.log_counts.shape
    heads, q_len = query.shape[1:3]
    best = min(call.top_k, blocks)
    found = torch.empty(batch, kv_heads, q_len, best, dtype=torch.int32, device=query.device)
    if found.numel() == 0:
        return found
    state = RoutedState(call.keys, call.log_counts)
    places = places_of(
        q_len, call.kv_len, call.query_offset, call.starts, call.block_size, query.device
    )
    count = max(1, TILE_ELEMENTS // max(1, batch * heads * blocks * marks))
    for begin in range(0, q_len, count):
        rows = slice(begin, begin + count)
        each = scores_of(query[:, :, rows], state, call.scale)
        at = Places(*(x[:, rows] for x in places))
        lowest, far = far_blocks(at, call.near, call.base, blocks)
        # the probabilities of a single head have the order of its scores
        scores = each[:, :, 0] if each.shape[2] == 1 else mean_over_heads(each, far)
        found[:, :, rows] = best_blocks(scores, lowest, far, best)
    return found


def far_blocks(
    places: Places, near: int, base: Tensor | None, blocks: int
) -> tuple[Tensor, Tensor]:
    """Number (B | 1, 1, n, 1) of the first block of each query's sequence, and whether a query may
    choose a block, (B | 1, 1, n, blocks); with `base`, blocks count all sequences."""
    number = torch.arange(blocks, device=places.own.device)
    own = places.own[:, None, :, None]
    lowest = torch.zeros_like(own)
    if base is not None:
        lowest = base[places.at.clamp(min=0)][:, None, :, None]
    return lowest, (number >= lowest) & (number < lowest + own - near)


def best_blocks(scores: Tensor, lowest: Tensor, far: Tensor, best: int) -> Tensor:
    """int32 (B, Hkv, n, best) from scores (B, Hkv, n, C) and what `far_blocks` gives."""
    scores = scores.masked_fill(~far | scores.isnan(), NEG_INF)
    values, chosen = _largest(scores, best)
    return (chosen - lowest).masked_fill(values == NEG_INF, -1).to(torch.int32)


def _largest(scores: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """The largest scores in order and their places, the lower place first of equal ones."""
    if scores.dtype == torch.float64:
        values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        return values[..., :best], order[..., :best]
    # as integers, whose order is that of the numbers, with the place below: no two are equal
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = torch.arange(scores.shape[-1], device=scores.device)
    ranked = (bits.to(torch.int64) << 32) | (0x7FFFFFFF - place)
    order = torch.topk(ranked, best, dim=-1).indices
    return scores.gather(-1, order), order


def _eager(*flat) -> Tensor:
    return choose(Choice(*flat))


def _fake(*flat) -> Tensor:
    call = Choice(*flat)
    batch, kv_heads, blocks, _ = call.log_counts.shape
    shape = batch, kv_heads, call.query.shape[2], min(call.top_k, blocks)
    return call.query.new_empty(shape, dtype=torch.int32)


_FIELDS = [field.name for field in dataclasses.fields(Choice)]
_OVERLOADS = {
    backend: overload(f"choose_blocks.{backend}({schema_of(Choice)}) -> Tensor", run, _fake)
    for backend, run in (("eager", _eager), ("cpu", None))
}


def choose_by(call: Choice, backend: str) -> Tensor:
    """The choice by a backend. Triton has no kernel of its own for it: PyTorch's products serve."""
    flat = [getattr(call, name) for name in _FIELDS]
    run = _OVERLOADS["cpu" if backend == "cpu" else "eager"]
    if in_torch_func() and not torch.compiler.is_compiling():
        opened_tensor = transforms().opened_tensor
        flat = [opened_tensor(x) if isinstance(x, Tensor) else x for x in flat]
        return _Mapped.apply(run, *flat)
    return run(*flat)


class _Mapped(torch.autograd.Function):
    """A choice under torch.vmap: the mapped dimension joins the batch."""

    @staticmethod
    def forward(run, *flat) -> Tensor:
        return run(*flat)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info, in_dims, run, *flat):
        size, batch = info.batch_size, 0
        given = dict(zip(_FIELDS, flat, strict=True))
        dims = dict(zip(_FIELDS, in_dims[1:], strict=True))
        if any(dims[n] is not None for n in ("starts", "base")):
            raise NotImplementedError("cu_seqlens: expected one for all samples of vmap")
        for name in ("query", "keys", "log_counts"):
            x = _first(given[name], dims[name], size)
            batch = x.shape[1]
            given[name] = x.flatten(0, 1)
        offset = given["query_offset"]
        if offset is not None and (dims["query_offset"] is not None or offset.numel() > 1):
            mapped = _first(offset, dims["query_offset"], size)
            given["query_offset"] = mapped.expand(size, batch).flatten().contiguous()
        return _Mapped.apply(run, *given.values()).unflatten(0, (size, batch)), 0


def _first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """With the mapped dimension in front."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
