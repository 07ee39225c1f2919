"""The far field of hybrid attention in plain PyTorch: sums of chunks, running totals, reading.

The interface of every backend of the far field:

    sums_forward(key, value, landmarks, keep, scale) -> (n, K, V)
    sums_backward(dn, dK, dV, key, value, landmarks, keep, scale) -> (dkey, dvalue, dlandmarks)
    mass_forward(query, landmarks, core, L, R, scale) -> (numerator, mass, reference)
    mass_backward(dnumerator, dmass, query, landmarks, core, L, R, scale)
        -> (dquery, dlandmarks, dcore, dL, dR)

key (B, H, C, w, D), value (B, H, C, w, Dv), any strides with stride(-1) == 1; landmarks (H, M, D)
or (B, H, M, D); keep bool (B, C, w) or None, True = takes part. Sums are float32 (float64 for
float64):

    a_jl = softmax_l(scale k_j . x_l), n_l = sum_j a_jl, K_l = sum_j a_jl k_j, V_l = sum_j a_jl v_j
    da_jl = dn_l + dK_l . k_j + dV_l . v_j, ds_j = a_j * (da_j - a_j . da_j)
    dk_j = sum_l a_jl dK_l + scale ds_jl x_l, dv_j = sum_l a_jl dV_l, dx_l = scale sum_j ds_jl k_j

query (B, Hq, C, w, D), core (Hkv, M, M) or (B, Hkv, M, M); L (B, Hkv, C, M) and R
(B, Hkv, C, M, Dv) are what the queries of a chunk read. With h_l = scale |x_l|^2 / 2, for a core of
a unit diagonal, and top = max_l (L_l - h_l):

    F_il = exp(scale q_i . x_l - h_l - max_l), U_il = (F core)_il exp(L_l - h_l - top)
    numerator = U R, mass = sum_l U, reference = max_l + top (treated as a constant)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NEG_INF = float("-inf")
BUDGET = 1 << 20  # weights a_jl held at a time


def sums_forward(key, value, landmarks, keep, scale) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(key.dtype, torch.float32)
    marks = landmarks.shape[-2]
    n = key.new_empty(*key.shape[:3], marks, dtype=dtype)
    K, V = (n.new_empty(*n.shape, x.shape[-1]) for x in (key, value))
    x = scale * landmarks.to(dtype).unsqueeze(-3)
    for part in spans(key, marks):
        k, v, a = routed(key[:, :, part], value[:, :, part], x, _of(keep, part))
        n[:, :, part] = a.sum(-2)
        K[:, :, part], V[:, :, part] = a.mT @ k, a.mT @ v
    return n, K, V


def sums_backward(dn, dK, dV, key, value, landmarks, keep, scale) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(key.dtype, torch.float32)
    dkey, dvalue = (x.new_empty(x.shape) for x in (key, value))
    x = scale * landmarks.to(dtype).unsqueeze(-3)
    dx = torch.zeros_like(x)
    for part in spans(key, landmarks.shape[-2]):
        k, v, a = routed(key[:, :, part], value[:, :, part], x, _of(keep, part))
        dK_part, dV_part = dK[:, :, part], dV[:, :, part]
        da = k @ dK_part.mT + v @ dV_part.mT + dn[:, :, part].unsqueeze(-2)
        ds = a * (da - (a * da).sum(-1, keepdim=True))
        dkey[:, :, part], dvalue[:, :, part] = a @ dK_part + ds @ x, a @ dV_part
        dx += (ds.mT @ k).sum_to_size(x.shape)
    return dkey, dvalue, (scale * dx).squeeze(-3).to(landmarks.dtype)


def routed(key, value, x, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and their weights under the landmarks; 0 where hidden."""
    key, value = key.to(x.dtype), value.to(x.dtype)
    if keep is None:
        return key, value, torch.softmax(key @ x.mT, -1)
    hidden = ~keep[:, None, :, :, None]
    key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    return key, value, torch.softmax(key @ x.mT, -1).masked_fill(hidden, 0.0)


def spans(x: Tensor, marks: int) -> Iterator[slice]:
    """Ranges of chunks whose weights fit the budget."""
    batch, heads, chunks, width, _ = x.shape
    step = max(1, BUDGET // max(1, batch * heads * width * marks))
    for first in range(0, chunks, step):
        yield slice(first, min(chunks, first + step))


def _of(keep: Tensor | None, part: slice) -> Tensor | None:
    return None if keep is None else keep[:, part]


class _Reading(NamedTuple):
    """Some chunks, the group's heads under each other: (B, Hkv, C, group * w, ...)."""

    q: Tensor
    F: Tensor
    G: Tensor  # F core
    held: Tensor  # (B, Hkv, C, 1, M)
    reference: Tensor
    R: Tensor


class _Parameters(NamedTuple):
    x: Tensor  # ([B,] Hkv, 1, M, D), times the scale
    half: Tensor  # ([B,] Hkv, 1, 1, M)
    core: Tensor  # ([B,] Hkv, 1, M, M)


def mass_forward(query, landmarks, core, L, R, scale) -> tuple[Tensor, Tensor, Tensor]:
    given = parameters(landmarks, core, scale, L.dtype)
    numerator = L.new_empty(*query.shape[:4], R.shape[-1])
    mass, reference = L.new_empty(query.shape[:4]), L.new_empty(query.shape[:4])
    for part in spans(query, landmarks.shape[-2]):
        r = read(query[:, :, part], given, L[:, :, part], R[:, :, part])
        U = r.G * r.held
        back = by_head(query)
        numerator[:, :, part] = back(U @ r.R)
        mass[:, :, part] = back(U.sum(-1, keepdim=True)).squeeze(-1)
        reference[:, :, part] = back(r.reference).squeeze(-1)
    return numerator, mass, reference


def mass_backward(
    dnumerator, dmass, query, landmarks, core, L, R, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = parameters(landmarks, core, scale, L.dtype)
    dquery, dL, dR = query.new_empty(query.shape), torch.empty_like(L), torch.empty_like(R)
    dx, dhalf, dcore = (torch.zeros_like(x) for x in given)
    heads = L.shape[1]
    for part in spans(query, landmarks.shape[-2]):
        r = read(query[:, :, part], given, L[:, :, part], R[:, :, part])
        dn, dm = _by_group(dnumerator[:, :, part], heads), dmass[:, :, part].unsqueeze(-1)
        U, dU = r.G * r.held, dn @ r.R.mT + _by_group(dm, heads)
        dG = dU * r.held
        dreading = r.F * (dG @ given.core.mT)
        pull = (U * dU).sum(-2, keepdim=True)
        dR[:, :, part], dL[:, :, part] = U.mT @ dn, pull.squeeze(-2)
        dquery[:, :, part] = by_head(query)(dreading @ given.x)
        dcore += (r.F.mT @ dG).sum_to_size(dcore.shape)
        dx += (dreading.mT @ r.q).sum_to_size(dx.shape)
        dhalf -= (pull + dreading.sum(-2, keepdim=True)).sum_to_size(dhalf.shape)
    dlandmarks = scale * dx + dhalf.mT * given.x  # half = scale |x|^2 / 2
    return (
        dquery, dlandmarks.squeeze(-3).to(landmarks.dtype), dcore.squeeze(-3).to(core.dtype), dL, dR
    )  # fmt: skip


def parameters(landmarks: Tensor, core: Tensor, scale: float, dtype: torch.dtype) -> _Parameters:
    x = landmarks.to(dtype).unsqueeze(-3)
    half = 0.5 * scale * x.square().sum(-1).unsqueeze(-2)
    return _Parameters(scale * x, half, core.to(dtype).unsqueeze(-3))


def read(query: Tensor, given: _Parameters, L: Tensor, R: Tensor) -> _Reading:
    q = _by_group(query, L.shape[1]).to(L.dtype)
    reading = q @ given.x.mT - given.half
    highest = reading.detach().amax(-1, keepdim=True)
    F = torch.exp(reading - highest)
    held = L.unsqueeze(-2) - given.half
    top = held.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)  # nothing held: mass 0
    return _Reading(q, F, F @ given.core, torch.exp(held - top), highest + top, R)


def _by_group(x: Tensor, heads: int) -> Tensor:
    """(B, Hq, C, w, *) -> (B, Hkv, C, group * w, *)"""
    return x.unflatten(1, (heads, x.shape[1] // heads)).transpose(2, 3).flatten(3, 4)


def by_head(query: Tensor):
    """The way back for the shapes of `query`."""
    _, heads, _, width, _ = query.shape

    def back(x: Tensor) -> Tensor:
        group = heads // x.shape[1]
        return x.unflatten(3, (group, width)).transpose(2, 3).flatten(1, 2)

    return back


def running_sums(x: Tensor, reverse: bool) -> Tensor:
    """sum_{d<=c} x_d, or sum_{d>=c} x_d, of x (B, H, C, ...)."""
    return _scan(None, x, reverse)


def running_states(l: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741, the formula's
    """L_c = logsumexp_{d<=c} l_d, R_c = sum_{d<=c} exp(l_d - L_c) r_d of (B, H, C, M[, Dv])."""
    L = torch.logcumsumexp(l, 2)
    return L, _scan(_falls(L), _fall(l, L) * r, False)


def running_states_backward(dL, dR, l, r, L, R) -> tuple[Tensor, Tensor]:  # noqa: E741
    """With A_c = sum_{d>=c} exp(L_c - L_d) dR_d and b_c = sum_{d>=c} exp(L_c - L_d) (dL_d + dR_d .
    (R_c - R_d)), differences that cancel exactly where a state stays as it is: dr_c = exp(l_c -
    L_c) A_c, dl_c = exp(l_c - L_c) (A_c . (r_c - R_c) + b_c).
    """
    later = torch.cat([_falls(L)[:, :, 1:], L.new_zeros(*L.shape[:2], 1, L.shape[3], 1)], 2)
    A, b = _scan(later, dR, True), dL.unsqueeze(-1).clone()
    b[:, :, :-1] += later[:, :, :-1] * _dot(A[:, :, 1:], R[:, :, :-1] - R[:, :, 1:])
    b, weight = _scan(later, b, True), _fall(l, L)
    return (weight * (_dot(A, r - R) + b)).squeeze(-1), weight * A


def _scan(fall: Tensor | None, x: Tensor, reverse: bool) -> Tensor:
    """y_c = fall_c y_{c-1} + x_c along dimension 2 (from y_{c+1} in `reverse`), a factor of 1 where
    there is none: blocks of sqrt(C) side by side, then over the blocks. The same bits at every run.
    """
    count = x.shape[2]
    size = max(1, math.isqrt(count))
    blocks = -(-count // size)

    def cut(t: Tensor) -> Tensor:
        missing = [0, 0] * (t.dim() - 3) + [0, blocks * size - count]
        return pad(t, missing).unflatten(2, (blocks, size))

    if count == 0:
        return x.clone()
    y = cut(x).clone()
    path = None if fall is None else cut(fall).clone()
    inside = range(size - 2, -1, -1) if reverse else range(1, size)
    step = 1 if reverse else -1
    for i in inside:
        past = y[:, :, :, i + step]
        y[:, :, :, i] += past if path is None else path[:, :, :, i] * past
        if path is not None:
            path[:, :, :, i] *= path[:, :, :, i + step]
    last = 0 if reverse else size - 1
    ends = y[:, :, :, last].clone()
    across = range(blocks - 2, -1, -1) if reverse else range(1, blocks)
    for b in across:
        past = ends[:, :, b + step]
        ends[:, :, b] += past if path is None else path[:, :, b, last] * past
    here, there = (slice(-1), slice(1, None)) if reverse else (slice(1, None), slice(-1))
    before = ends[:, :, there].unsqueeze(3)
    y[:, :, here] += before if path is None else path[:, :, here] * before
    return y.flatten(2, 3)[:, :, :count]


def _falls(L: Tensor) -> Tensor:
    """exp(L_{c-1} - L_c), 0 for the first, with a dimension more."""
    return pad(_fall(L[:, :, :-1], L[:, :, 1:]), (0, 0, 0, 0, 1, 0))


def _fall(low: Tensor, high: Tensor) -> Tensor:
    """exp(low - high) with a dimension more; 0 where low holds nothing."""
    return torch.exp(low - high).masked_fill(low == NEG_INF, 0.0).unsqueeze(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
