"""What the slots of hybrid attention hold, chunk by chunk: the interface of every backend.

    forward(key, value, landmarks, keep, scale) -> (n, K, V)
    backward(dn, dK, dV, key, value, landmarks, keep, scale) -> (dkey, dvalue, dlandmarks)

key (B, H, C, w, D), value (B, H, C, w, Dv), any strides with stride(-1) == 1; landmarks (H, M, D)
or (B, H, M, D); keep bool (B, C, w) or None, True = takes part. Sums are float32 (float64 for
float64):

    a_jl = softmax_l(scale k_j . x_l), n_l = sum_j a_jl, K_l = sum_j a_jl k_j, V_l = sum_j a_jl v_j
    da_jl = dn_l + dK_l . k_j + dV_l . v_j, ds_j = a_j * (da_j - a_j . da_j)
    dk_j = sum_l a_jl dK_l + scale ds_jl x_l, dv_j = sum_l a_jl dV_l, dx_l = scale sum_j ds_jl k_j
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BUDGET = 1 << 20  # weights a_jl held at a time


def forward(key, value, landmarks, keep, scale) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(key.dtype, torch.float32)
    marks = landmarks.shape[-2]
    n = key.new_empty(*key.shape[:3], marks, dtype=dtype)
    K, V = (n.new_empty(*n.shape, x.shape[-1]) for x in (key, value))
    x = scale * landmarks.to(dtype).unsqueeze(-3)
    for part in pieces(key, marks):
        k, v, a = routed(key[:, :, part], value[:, :, part], x, _of(keep, part))
        n[:, :, part] = a.sum(-2)
        K[:, :, part], V[:, :, part] = a.mT @ k, a.mT @ v
    return n, K, V


def backward(dn, dK, dV, key, value, landmarks, keep, scale) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(key.dtype, torch.float32)
    dkey, dvalue = (x.new_empty(x.shape) for x in (key, value))
    x = scale * landmarks.to(dtype).unsqueeze(-3)
    dx = torch.zeros_like(x)
    for part in pieces(key, landmarks.shape[-2]):
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


def pieces(x: Tensor, marks: int) -> Iterator[slice]:
    """Ranges of chunks whose weights fit the budget."""
    batch, heads, chunks, width, _ = x.shape
    step = max(1, BUDGET // max(1, batch * heads * width * marks))
    for first in range(0, chunks, step):
        yield slice(first, min(chunks, first + step))


def _of(keep: Tensor | None, part: slice) -> Tensor | None:
    return None if keep is None else keep[:, part]
