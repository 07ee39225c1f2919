"""Running totals over chunks, of sums and of Nyström states.

    running_sums(x, reverse) -> sum_{d<=c} x_d, or sum_{d>=c} x_d
    forward(l, r) -> (L, R): L_c = logsumexp_{d<=c} l_d, R_c = sum_{d<=c} exp(l_d - L_c) r_d
    backward(dL, dR, l, r, L, R) -> (dl, dr)

x (B, H, C, ...), l (B, H, C, M), r (B, H, C, M, Dv). With A_c = sum_{d>=c} exp(L_c - L_d) dR_d and
b_c = sum_{d>=c} exp(L_c - L_d) (dL_d + dR_d . (R_c - R_d)), differences that cancel exactly where a
state stays as it is: dr_c = exp(l_c - L_c) A_c, dl_c = exp(l_c - L_c) (A_c . (r_c - R_c) + b_c).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def running_sums(x: Tensor, reverse: bool) -> Tensor:
    if x.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return x.flip(2).cumsum(2).flip(2) if reverse else x.cumsum(2)
    total, last = x.clone(), x.shape[2] - 1
    for c in range(1, x.shape[2]):
        here, past = (last - c, last - c + 1) if reverse else (c, c - 1)
        total[:, :, here] += total[:, :, past]
    return total


def forward(l: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741, the letters of the formula
    L, R = l.clone(), r.clone()
    for c in range(1, l.shape[2]):
        L[:, :, c] = torch.logaddexp(L[:, :, c - 1], l[:, :, c])
        fall = _fall(L[:, :, c - 1], L[:, :, c])
        R[:, :, c] = fall * R[:, :, c - 1] + _fall(l[:, :, c], L[:, :, c]) * r[:, :, c]
    return L, R


def backward(dL, dR, l, r, L, R) -> tuple[Tensor, Tensor]:  # noqa: E741
    A, b = dR.clone(), dL.unsqueeze(-1).clone()
    fall, step = _fall(L[:, :, :-1], L[:, :, 1:]), R[:, :, :-1] - R[:, :, 1:]
    for c in range(L.shape[2] - 2, -1, -1):
        later = A[:, :, c + 1]
        b[:, :, c] += fall[:, :, c] * (b[:, :, c + 1] + _dot(later, step[:, :, c]))
        A[:, :, c] += fall[:, :, c] * later
    weight = _fall(l, L)
    return (weight * (_dot(A, r - R) + b)).squeeze(-1), weight * A


def _fall(low: Tensor, high: Tensor) -> Tensor:
    """exp(low - high) with a dimension more; 0 where low holds nothing."""
    return torch.exp(low - high).masked_fill(low == NEG_INF, 0.0).unsqueeze(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
