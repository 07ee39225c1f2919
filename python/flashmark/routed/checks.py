"""Checks of the arguments of routed attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import (
    check_count,
    check_key_mask,
    check_kv_lengths,
    check_qkv,
    check_query_offset,
    check_same,
    check_sinks,
    check_tensor,
    finite,
    readable,
)
from flashmark.dispatch import choose_backend
from flashmark.nystrom.checks import MAX_LANDMARKS, check_lengths
from flashmark.routed.places import Blocks, Places, blocks_of, places_of, starts_of
from flashmark.routed.summaries import RoutedState

MAX_BLOCK = 1024  # keys


class Checked(NamedTuple):
    """Arguments that all functions of this folder take, in their final form."""

    backend: str
    scale: float
    softcap: float
    query_offset: Tensor | None  # int32 (1,) or (B,)
    kv_lengths: Tensor | None  # int32 (B,)
    cu_seqlens: Tensor | None  # int32 (S + 1,)
    starts: Tensor | None  # int32 (Nk,)
    keep: Tensor | None  # bool (B, Nk): keys that take part, by mask and length

    def blocks(self, key: Tensor, block_size: int) -> Blocks:
        """All blocks of the keys."""
        sequences = 1 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return blocks_of(key.shape[2], self.starts, sequences, block_size, key.device)

    def places(self, query: Tensor, key: Tensor, block_size: int) -> Places:
        """Places of the queries."""
        return places_of(
            query.shape[2], key.shape[2], self.query_offset, self.starts, block_size, query.device
        )


def check_call(
    query, key, value, block_size, near, scale, softcap, sinks, query_offset, kv_lengths,
    key_mask, cu_seqlens, backend,
) -> Checked:  # fmt: skip
    """Raise where an argument is not as the public functions say."""
    batch, heads, q_len, dim, kv_len = check_qkv(query, key, value)
    device = query.device
    backend = choose_backend("routed", backend, query)
    scale = 1.0 / math.sqrt(dim) if scale is None else finite("scale", scale)
    softcap = 0.0 if softcap is None else finite("softcap", softcap, negative=False)
    check_count("block_size", block_size, most=MAX_BLOCK)
    check_count("near", near, 0)
    if sinks is not None:
        check_sinks(sinks, heads, device)
    if query_offset is not None:
        query_offset = check_query_offset(query_offset, batch, q_len, kv_len, device)
    if kv_lengths is not None:
        kv_lengths = check_kv_lengths(kv_lengths, batch, kv_len, device)
    check_key_mask(key_mask, (batch, kv_len), device)
    starts = None
    if cu_seqlens is not None:
        cu_seqlens = check_lengths(query, key, True, cu_seqlens)
        assert cu_seqlens is not None
        starts = starts_of(cu_seqlens, kv_len)
        if query_offset is not None:
            raise ValueError("query_offset: expected None with cu_seqlens, got an offset")
    keep = key_mask
    if kv_lengths is not None:
        inside = torch.arange(kv_len, device=device) < kv_lengths[:, None]
        keep = inside if key_mask is None else inside & key_mask
    return Checked(backend, scale, softcap, query_offset, kv_lengths, cu_seqlens, starts, keep)


def check_indices(indices, query, key, block_size, near, checked: Checked) -> Tensor:
    """int32, contiguous. Values are looked at on a CPU alone, outside torch.compile."""
    check_tensor("indices", indices, 4)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")
    if indices.device != query.device:
        raise ValueError(
            f"indices: expected a tensor on {query.device} like query, got {indices.device}"
        )
    shape = query.shape[0], key.shape[1], query.shape[2]
    if indices.shape[:3] != shape:
        raise ValueError(
            f"indices: expected {shape} in the first dimensions, got {tuple(indices.shape[:3])}"
        )
    if readable(indices) and indices.numel():
        places = checked.places(query, key, block_size)
        last = places.own[:, None, :, None] - near - 1
        given = indices >= 0
        if bool(((indices < -1) | (given & (indices > last))).any()):
            raise ValueError(
                "indices: expected -1 or a block before the near ones of its query, got one out "
                "of range"
            )
        ordered = indices.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("indices: expected each block at most once, got one twice")
    if indices.dtype == torch.int64:
        indices = indices.clamp(-1, 2**31 - 1).to(torch.int32)
    return indices.contiguous()


def check_landmarks(landmarks, query: Tensor, key: Tensor) -> None:
    if landmarks is None:
        return
    if not isinstance(landmarks, Tensor):
        raise TypeError(f"landmarks: expected a tensor or None, got {type(landmarks).__name__}")
    check_same("landmarks", landmarks, dtype=None, device=query.device)
    batch, heads, dim = query.shape[0], key.shape[1], query.shape[3]
    shape = landmarks.shape
    fits = len(shape) in (3, 4) and shape[-3] == heads and shape[-1] == dim
    if not fits or (len(shape) == 4 and shape[0] != batch):
        raise ValueError(
            f"landmarks: expected ({heads}, M, {dim}) or ({batch}, {heads}, M, {dim}), "
            f"got {tuple(shape)}"
        )
    if not 1 <= shape[-2] <= MAX_LANDMARKS:
        raise ValueError(f"landmarks: expected 1 to {MAX_LANDMARKS} of them, got {shape[-2]}")


def check_scores(scores, landmarks, query: Tensor, key: Tensor, block_size: int) -> None:
    if scores is None:
        return
    if landmarks is not None:
        raise ValueError("scores: expected None with landmarks, got both")
    check_tensor("scores", scores, 4)
    check_same("scores", scores, dtype=None, device=query.device)
    wanted = query.shape[0], key.shape[1], query.shape[2], -(-key.shape[2] // block_size)
    if tuple(scores.shape) != wanted:
        raise ValueError(f"scores: expected shape {wanted}, got {tuple(scores.shape)}")


def check_state(state, query: Tensor, key: Tensor, landmarks, block_size: int) -> None:
    if state is None:
        return
    if not isinstance(state, RoutedState):
        raise TypeError(f"state: expected a RoutedState, got {type(state).__name__}")
    marks = 1 if landmarks is None else landmarks.shape[-2]
    wide = torch.promote_types(key.dtype, torch.float32)
    most = key.shape[2] // block_size
    check_tensor("state.keys", state.keys, 5)
    blocks = state.keys.shape[2]
    shape = key.shape[0], key.shape[1], blocks, marks
    if blocks > most:
        raise ValueError(f"state: expected at most the {most} finished blocks of key, got {blocks}")
    for name, x, wanted in zip(state._fields, state, ((*shape, key.shape[3]), shape), strict=True):
        if not isinstance(x, Tensor) or tuple(x.shape) != wanted or x.device != key.device:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"state.{name}: expected {wanted} on {key.device}, got {got}")
        if x.dtype != wide:
            raise TypeError(f"state.{name}: expected {wide}, got {x.dtype}")
