"""State of hybrid attention: a summary of the tokens it has consumed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import check_tensor

#: what landmarks keep of chunks, (B, Hkv, C, M, ...) each: sums (n, K, V) of "slots", or the states
#: (L, R) of Nyström attention
Totals = tuple[Tensor, ...]


class HybridState(NamedTuple):
    """All that hybrid attention keeps of the tokens it has consumed. Its size does not grow.

    The chunk of the next token is position // window. Far totals are float32 (float64 for float64
    inputs); they, keys and values carry gradients.
    """

    position: Tensor  # (B,) int64: tokens consumed
    keep: Tensor  # (B, 2 window) bool: which of the held tokens take part
    key: Tensor  # (B, Hkv, 2 window, D): the chunk before the current one, then the current one
    value: Tensor  # (B, Hkv, 2 window, Dv)
    far: Totals  # (B, Hkv, 3, M, ...): all chunks before the two, the one before, the current

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        landmarks: int,
        head_dim: int,
        v_dim: int | None = None,
        *,
        window: int,
        merge: str = "slots",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> HybridState:
        """The state before any token. `dtype` is that of keys and values."""
        v_dim = head_dim if v_dim is None else v_dim
        held = batch, kv_heads, 2 * window
        wide = torch.promote_types(dtype, torch.float32)
        shape = batch, kv_heads, 3, landmarks
        return cls(
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, 2 * window, dtype=torch.bool, device=device),
            torch.zeros(*held, head_dim, dtype=dtype, device=device),
            torch.zeros(*held, v_dim, dtype=dtype, device=device),
            empty_totals(merge, shape, head_dim, v_dim, wide, device),
        )


torch.serialization.add_safe_globals([HybridState])  # for torch.load, weights_only=True


def tensors_of(state: HybridState) -> tuple[Tensor, ...]:
    """The tensors of a state, in order."""
    return (*state[:4], *state.far)


def shapes(merge: str, shape: tuple[int, ...], dim: int, v_dim: int) -> list[tuple[int, ...]]:
    """Shapes of totals; `shape` is (B, Hkv, C, M)."""
    return [shape, (*shape, dim), (*shape, v_dim)] if merge == "slots" else [shape, (*shape, v_dim)]


def empty_totals(
    merge: str, shape: tuple[int, ...], dim: int, v_dim: int, dtype: torch.dtype, device
) -> Totals:
    """Totals of nothing; `shape` is (B, Hkv, C, M)."""
    wanted = shapes(merge, shape, dim, v_dim)
    first, *rest = (torch.zeros(each, dtype=dtype, device=device) for each in wanted)
    return (first if merge == "slots" else first.fill_(-math.inf), *rest)


def check_state(name: str, state, rows: int, window: int, merge: str, marks: int, key, value):
    """Raise where this is no HybridState of these sizes."""
    if not isinstance(state, HybridState):
        raise TypeError(f"{name}: expected a HybridState, got {type(state).__name__}")
    dim, v_dim, dtype, device = key.shape[3], value.shape[3], key.dtype, key.device
    held, wide = (rows, key.shape[1]), torch.promote_types(dtype, torch.float32)
    totals = shapes(merge, (*held, 3, marks), dim, v_dim)
    if len(state.far) != len(totals):
        raise ValueError(f"{name}.far: expected that of merge={merge!r}, got another merge's")
    tensors, kept = tensors_of(state), 2 * window
    wanted = [(rows,), (rows, kept), (*held, kept, dim), (*held, kept, v_dim), *totals]
    dtypes = [torch.int64, torch.bool, dtype, dtype] + [wide] * len(totals)
    for n, (x, shape, expected) in enumerate(zip(tensors, wanted, dtypes, strict=True)):
        if isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (shape, expected, device):
            continue
        part = f"{name}.{_NAMES[n]}" if n < 4 else f"{name}.far[{n - 4}]"
        check_tensor(part, x, len(shape))
        if x.shape != shape or x.device != device:
            raise ValueError(
                f"{part}: expected shape {shape} on {device}, got {tuple(x.shape)} on {x.device}"
            )
        raise TypeError(f"{part}: expected {expected}, got {x.dtype}")


_NAMES = HybridState._fields
