"""The far field of hybrid attention: what landmarks keep of chunks of keys, and running totals.

A total is a tuple of tensors (B, Hkv, C, M, ...), one entry a chunk. "slots" has plain sums
(n, K, V); "mass" and "gate" have states (L, R) of Nyström attention, merged in log space.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.autograd import first_order, unit_stride
from flashmark.nystrom import NystromState, nystrom_attention

Totals = tuple[Tensor, ...]


class Far(NamedTuple):
    """The parameters of a far field."""

    merge: str
    landmark_queries: Tensor  # (Hkv, M, D) or (B, Hkv, M, D)
    landmark_keys: Tensor
    core: Tensor | None
    scale: float
    backend: str


def of_chunks(far: Far, key: Tensor, value: Tensor, keep: Tensor | None) -> Totals:
    """What each chunk holds by itself: key (B, H, C, w, D), value likewise, keep (B, C, w)."""
    if far.merge == "slots":
        key, value = unit_stride(key), unit_stride(value)
        return _RoutedSums.apply(key, value, far.landmark_queries, keep, far.scale, far.backend)
    batch, heads, chunks, _, _ = key.shape
    query = key.new_empty(batch * chunks, heads, 0, key.shape[4])
    keep = None if keep is None else keep.flatten(0, 1)
    _, state = nystrom_attention(
        query, by_sample(key), by_sample(value), _landmarks(far, chunks),
        core=_of_samples(far.core.detach(), chunks), is_causal=False, scale=far.scale,
        key_mask=keep, return_state=True, backend=far.backend,
    )  # fmt: skip
    return tuple(x.unflatten(0, (batch, chunks)).transpose(1, 2) for x in state)


def added(far: Far, left: Totals, right: Totals) -> Totals:
    """The total of two."""
    if far.merge == "slots":
        return tuple(a + b for a, b in zip(left, right, strict=True))
    return NystromState(*left).merge(NystromState(*right), 0)


def running(far: Far, totals: Totals) -> Totals:
    """Inclusive running totals over the chunks."""
    if far.merge == "slots":
        return tuple(_RunningSums.apply(x) for x in totals)
    return _RunningStates.apply(*totals)


def shapes(merge: str, shape: tuple[int, ...], dim: int, v_dim: int) -> list[tuple[int, ...]]:
    """Of totals of `shape` (B, Hkv, C, M)."""
    return [shape, (*shape, dim), (*shape, v_dim)] if merge == "slots" else [shape, (*shape, v_dim)]


def empty(
    merge: str, shape: tuple[int, ...], dim: int, v_dim: int, dtype: torch.dtype, device
) -> Totals:
    """Totals of nothing; `shape` is (B, Hkv, C, M)."""
    wanted = shapes(merge, shape, dim, v_dim)
    first, *rest = (torch.zeros(each, dtype=dtype, device=device) for each in wanted)
    return (first if merge == "slots" else first.fill_(-math.inf), *rest)


def by_sample(x: Tensor) -> Tensor:
    """(B, H, C, n, *) -> (B C, H, n, *): chunks as samples."""
    return x.transpose(1, 2).flatten(0, 1)


def _of_samples(x: Tensor, chunks: int) -> Tensor:
    """Parameters of samples, repeated for their chunks; shared ones stay."""
    return x if x.dim() == 3 else x.repeat_interleave(chunks, 0)


def _landmarks(far: Far, chunks: int) -> Tensor | tuple[Tensor, Tensor]:
    lq = _of_samples(far.landmark_queries, chunks)
    if far.landmark_keys is far.landmark_queries:
        return lq
    return lq, _of_samples(far.landmark_keys, chunks)


def nystrom_read(far: Far, query: Tensor, totals: Totals) -> Tensor:
    """(B, Hq, C, w, Dv): Nyström attention of each chunk of queries to its state alone."""
    batch, _, chunks, _, dim = query.shape
    heads, v_dim = totals[1].shape[1], totals[1].shape[4]
    key = query.new_empty(batch * chunks, heads, 0, dim)
    value = query.new_empty(batch * chunks, heads, 0, v_dim)
    state = NystromState(*(by_sample(x) for x in totals))
    out = nystrom_attention(
        by_sample(query), key, value, _landmarks(far, chunks), core=_of_samples(far.core, chunks),
        is_causal=False, scale=far.scale, state=state, backend=far.backend,
    )  # fmt: skip
    return out.unflatten(0, (batch, chunks)).transpose(1, 2)


def mass_read(far: Far, query: Tensor, totals: Totals) -> tuple[Tensor, Tensor, Tensor]:
    """(numerator, mass, reference) of each row, times e^reference the true ones."""
    return _MassRead.apply(query, far.landmark_keys, far.core, *totals, far.scale, far.backend)


class _RoutedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key, value, landmarks, keep, scale, backend):
        ctx.save_for_backward(key, value, landmarks, keep)
        ctx.options = scale, backend
        return torch.ops.flashmark.hybrid_sums_forward(key, value, landmarks, keep, *ctx.options)

    @staticmethod
    @first_order("hybrid_attention")
    def backward(ctx, dn, dK, dV):
        grads = torch.ops.flashmark.hybrid_sums_backward(
            *(x.contiguous() for x in (dn, dK, dV)), *ctx.saved_tensors, *ctx.options
        )
        return *grads, None, None, None


class _MassRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, landmarks, core, L, R, scale, backend):
        ctx.save_for_backward(query, landmarks, core, L, R)
        ctx.options = scale, backend
        numerator, mass, reference = torch.ops.flashmark.hybrid_mass_forward(
            query, landmarks, core, L, R, *ctx.options
        )
        ctx.mark_non_differentiable(reference)
        return numerator, mass, reference

    @staticmethod
    @first_order("hybrid_attention")
    def backward(ctx, dnumerator, dmass, _):
        grads = torch.ops.flashmark.hybrid_mass_backward(
            dnumerator, dmass, *ctx.saved_tensors, *ctx.options
        )
        return *grads, None, None


class _RunningSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ops.flashmark.hybrid_running_sums(x, False)

    @staticmethod
    @first_order("hybrid_attention")
    def backward(ctx, dtotal):
        return (torch.ops.flashmark.hybrid_running_sums(dtotal, True),)


class _RunningStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_L, own_R):
        L, R = torch.ops.flashmark.hybrid_scan_forward(own_L, own_R)
        ctx.save_for_backward(own_L, own_R, L, R)
        return L, R

    @staticmethod
    @first_order("hybrid_attention")
    def backward(ctx, dL, dR):
        return torch.ops.flashmark.hybrid_scan_backward(dL, dR, *ctx.saved_tensors)
