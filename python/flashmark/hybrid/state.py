"""What hybrid attention keeps of the tokens it has consumed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import check_tensor
from flashmark.hybrid import far_field
from flashmark.hybrid.far_field import Totals


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
            far_field.empty(merge, shape, head_dim, v_dim, wide, device),
        )


torch.serialization.add_safe_globals([HybridState])  # for torch.load, weights_only=True


def check_state(state, rows, window, merge, marks, key, value) -> None:
    if state is None:
        return
    if not isinstance(state, HybridState):
        raise TypeError(f"state: expected a HybridState, got {type(state).__name__}")
    held, wide = (rows, key.shape[1]), torch.promote_types(key.dtype, torch.float32)
    dims = key.shape[3], value.shape[3]
    totals = far_field.shapes(merge, (*held, 3, marks), *dims)
    if len(state.far) != len(totals):
        raise ValueError(f"state.far: expected that of merge={merge!r}, got another merge's")
    wanted = {
        "position": ((rows,), torch.int64),
        "keep": ((rows, 2 * window), torch.bool),
        "key": ((*held, 2 * window, dims[0]), key.dtype),
        "value": ((*held, 2 * window, dims[1]), key.dtype),
    } | {f"far[{n}]": (shape, wide) for n, shape in enumerate(totals)}
    for (name, (shape, dtype)), x in zip(wanted.items(), (*state[:4], *state.far), strict=True):
        check_tensor(f"state.{name}", x, len(shape))
        if x.shape != shape or x.device != key.device:
            raise ValueError(
                f"state.{name}: expected shape {shape} on {key.device}, "
                f"got {tuple(x.shape)} on {x.device}"
            )
        if x.dtype != dtype:
            raise TypeError(f"state.{name}: expected {dtype}, got {x.dtype}")
