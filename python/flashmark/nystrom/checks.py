"""Checks that all operators with landmarks share, and the core of landmarks that come without."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.arguments import check_same, check_tensor, readable
from flashmark.nystrom.landmark_core import solve_core

MAX_LANDMARKS = 256


def wide_landmarks(lq: Tensor, lk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Landmarks in the precision that a query of `dtype` is computed in, cast once for all uses.

    Autograd adds the gradients of all uses in the dtype of what is used. Of landmarks close to each
    other these gradients cancel, and in float16 each of them may be infinite.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if lq.dtype in (wide, torch.float64) and lk.dtype in (wide, torch.float64):
        return lq, lk
    cast = lq.to(torch.promote_types(lq.dtype, wide))
    return cast, cast if lk is lq else lk.to(torch.promote_types(lk.dtype, wide))


def default_core(lq: Tensor, lk: Tensor | None, scale: float, kind: str) -> Tensor:
    """`landmark_core` of checked landmarks from `wide_landmarks`, tied if `lk` is None."""
    return solve_core(lq, lk, scale, "cholesky" if lk is None else "tikhonov", kind)


def check_lengths(query, key, is_causal, cu_seqlens) -> Tensor | None:
    """`cu_seqlens` in int32."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len != kv_len and (is_causal or cu_seqlens is not None):
        what = "is_causal=True" if is_causal else "cu_seqlens"
        raise ValueError(f"key: expected length {q_len} like query with {what}, got {kv_len}")
    if cu_seqlens is None:
        return None
    check_tensor("cu_seqlens", cu_seqlens, 1)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    _check_device("cu_seqlens", cu_seqlens, query.device)
    if query.shape[0] != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens: expected shape (S + 1,) with S >= 1 and a batch of 1, "
            f"got {tuple(cu_seqlens.shape)} and a batch of {query.shape[0]}"
        )
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q_len or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens: expected to rise from 0 to {q_len}, got {bounds}")
    if cu_seqlens.dtype == torch.int64:  # unread values may not fit
        cu_seqlens = cu_seqlens.clamp(0, q_len).to(torch.int32)
    return cu_seqlens.contiguous()


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like query, got {x.device}")


def check_landmarks(landmarks, query, key) -> tuple[Tensor, Tensor]:
    pair = (landmarks, landmarks) if isinstance(landmarks, Tensor) else landmarks
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = type(landmarks).__name__
        raise TypeError(f"landmarks: expected a tensor or a pair of tensors, got {got}")
    for x in pair[:1] if pair[0] is pair[1] else pair:
        if not isinstance(x, Tensor):
            raise TypeError(f"landmarks: expected tensors, got {type(x).__name__}")
        check_same("landmarks", x, dtype=None, device=query.device)
        batch, heads, dim, shape = query.shape[0], key.shape[1], query.shape[3], x.shape
        fits = len(shape) in (3, 4) and shape[-3] == heads and shape[-1] == dim
        if not fits or (len(shape) == 4 and shape[0] != batch) or shape != pair[0].shape:
            raise ValueError(
                f"landmarks: expected ({heads}, M, {dim}) or ({batch}, {heads}, M, {dim}), "
                f"both of a pair alike, got {tuple(shape)}"
            )
    if not 1 <= shape[-2] <= MAX_LANDMARKS:
        raise ValueError(f"landmarks: expected 1 to {MAX_LANDMARKS} of them, got {shape[-2]}")
    return tuple(pair)


def check_core(core, batch: int, heads: int, marks: int, device) -> None:
    if core is None:
        return
    if not isinstance(core, Tensor):
        raise TypeError(f"core: expected a tensor or None, got {type(core).__name__}")
    check_same("core", core, dtype=None, device=device)
    shape = heads, marks, marks
    if tuple(core.shape) != ((batch, *shape) if core.dim() == 4 else shape):
        raise ValueError(
            f"core: expected shape {shape} or {(batch, *shape)}, got {tuple(core.shape)}"
        )
