"""The far field out of differentiable PyTorch functions, for derivatives of its gradients.

Formulas and shapes are those of `flashmark.hybrid.eager`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.hybrid import eager

NEG_INF = float("-inf")


def sums(key, value, landmarks, keep, scale, _=None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(key.dtype, torch.float32)
    x = scale * landmarks.to(dtype).unsqueeze(-3)
    k, v, a = eager.routed(key, value, x, keep)
    return a.sum(-2), a.mT @ k, a.mT @ v


def mass(query, landmarks, core, L, R, scale, _=None) -> tuple[Tensor, Tensor, Tensor]:
    given = eager.parameters(landmarks, core, scale, L.dtype)
    r, back = eager.read(query, given, L, R), eager.by_head(query)
    U = r.G * r.held
    mass = back(U.sum(-1, keepdim=True)).squeeze(-1)
    return back(U @ R), mass, back(r.reference).squeeze(-1)


def running_sums(x: Tensor, _=None) -> Tensor:
    return x.cumsum(2)


def running_states(l: Tensor, r: Tensor, _=None) -> tuple[Tensor, Tensor]:  # noqa: E741, the formula's
    if not l.shape[2]:
        return l, r
    (L, R), *rest = [(l[:, :, c], r[:, :, c]) for c in range(l.shape[2])]
    all_L, all_R = [L], [R]
    for own_L, own_R in rest:
        L, R = merged(L, R, own_L, own_R)
        all_L.append(L)
        all_R.append(R)
    return torch.stack(all_L, 2), torch.stack(all_R, 2)


def merged(L: Tensor, R: Tensor, l: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """(..., M) and (..., M, Dv): one state of two; -inf holds nothing."""
    top = torch.maximum(L, l).detach()
    top = top.masked_fill(top == NEG_INF, 0.0)
    left, right = torch.exp(L - top), torch.exp(l - top)
    total = left + right
    nothing = total == 0.0
    total = total.masked_fill(nothing, 1.0)
    mean = ((left / total).unsqueeze(-1) * R) + (right / total).unsqueeze(-1) * r
    return (top + torch.log(total)).masked_fill(nothing, NEG_INF), mean
