"""How queries read the far field of merge="mass": numerator and mass, chunk by chunk.

    forward(query, landmarks, core, L, R, scale) -> (numerator, mass, reference)
    backward(dnumerator, dmass, query, landmarks, core, L, R, scale)
        -> (dquery, dlandmarks, dcore, dL, dR)

query (B, Hq, C, w, D), landmarks (Hkv, M, D) or (B, Hkv, M, D), core (Hkv, M, M) or
(B, Hkv, M, M); L (B, Hkv, C, M) and R (B, Hkv, C, M, Dv) are what the queries of a chunk read. With
h_l = scale |x_l|^2 / 2, for a core of a unit diagonal, and top = max_l (L_l - h_l):

    F_il = exp(scale q_i . x_l - h_l - max_l), U_il = (F core)_il exp(L_l - h_l - top)
    numerator = U R, mass = sum_l U, reference = max_l + top (treated as a constant)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.hybrid.eager import pieces

NEG_INF = float("-inf")


class _Reading(NamedTuple):
    """Of a piece of chunks, the group's heads under each other: (B, Hkv, C, group * w, ...)."""

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


def forward(query, landmarks, core, L, R, scale) -> tuple[Tensor, Tensor, Tensor]:
    given = _parameters(landmarks, core, scale, L.dtype)
    numerator = L.new_empty(*query.shape[:4], R.shape[-1])
    mass, reference = L.new_empty(query.shape[:4]), L.new_empty(query.shape[:4])
    for part in pieces(query, landmarks.shape[-2]):
        r = _read(query[:, :, part], given, L[:, :, part], R[:, :, part])
        U = r.G * r.held
        by_head = _by_head(query)
        numerator[:, :, part] = by_head(U @ r.R)
        mass[:, :, part] = by_head(U.sum(-1, keepdim=True)).squeeze(-1)
        reference[:, :, part] = by_head(r.reference).squeeze(-1)
    return numerator, mass, reference


def backward(
    dnumerator, dmass, query, landmarks, core, L, R, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _parameters(landmarks, core, scale, L.dtype)
    dquery, dL, dR = query.new_empty(query.shape), torch.empty_like(L), torch.empty_like(R)
    dx, dhalf, dcore = (torch.zeros_like(x) for x in given)
    heads = L.shape[1]
    for part in pieces(query, landmarks.shape[-2]):
        r = _read(query[:, :, part], given, L[:, :, part], R[:, :, part])
        dn, dm = _by_group(dnumerator[:, :, part], heads), dmass[:, :, part].unsqueeze(-1)
        U, dU = r.G * r.held, dn @ r.R.mT + _by_group(dm, heads)
        dG = dU * r.held
        dreading = r.F * (dG @ given.core.mT)
        pull = (U * dU).sum(-2, keepdim=True)
        dR[:, :, part], dL[:, :, part] = U.mT @ dn, pull.squeeze(-2)
        dquery[:, :, part] = _by_head(query)(dreading @ given.x)
        dcore += (r.F.mT @ dG).sum_to_size(dcore.shape)
        dx += (dreading.mT @ r.q).sum_to_size(dx.shape)
        dhalf -= (pull + dreading.sum(-2, keepdim=True)).sum_to_size(dhalf.shape)
    dlandmarks = scale * dx + dhalf.mT * given.x  # half = scale |x|^2 / 2
    return (
        dquery, dlandmarks.squeeze(-3).to(landmarks.dtype), dcore.squeeze(-3).to(core.dtype), dL, dR
    )  # fmt: skip


def _parameters(landmarks: Tensor, core: Tensor, scale: float, dtype: torch.dtype) -> _Parameters:
    x = landmarks.to(dtype).unsqueeze(-3)
    half = 0.5 * scale * x.square().sum(-1).unsqueeze(-2)
    return _Parameters(scale * x, half, core.to(dtype).unsqueeze(-3))


def _read(query: Tensor, given: _Parameters, L: Tensor, R: Tensor) -> _Reading:
    q = _by_group(query, L.shape[1]).to(L.dtype)
    reading = q @ given.x.mT - given.half
    highest = reading.amax(-1, keepdim=True)
    F = torch.exp(reading - highest)
    held = L.unsqueeze(-2) - given.half
    top = held.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)  # nothing held: mass 0
    return _Reading(q, F, F @ given.core, torch.exp(held - top), highest + top, R)


def _by_group(x: Tensor, heads: int) -> Tensor:
    """(B, Hq, C, w, *) -> (B, Hkv, C, group * w, *)"""
    return x.unflatten(1, (heads, x.shape[1] // heads)).transpose(2, 3).flatten(3, 4)


def _by_head(query: Tensor):
    """The way back for the shapes of `query`."""
    _, heads, _, width, _ = query.shape

    def back(x: Tensor) -> Tensor:
        group = heads // x.shape[1]
        return x.unflatten(3, (group, width)).transpose(2, 3).flatten(1, 2)

    return back
