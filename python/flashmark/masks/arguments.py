"""Checks of what users pass to the masks: the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

#: what a mask can be compiled for
BLOCK_SIZES = (16, 32, 64, 128)


def check_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(
            f"block_size: expected a positive int or a pair of them, got {block_size!r}"
        )
    return pair


def integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    return value


def integer_tensor(name: str, value: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    if value.dim() not in dims:
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected {allowed} dimension(s), got shape {tuple(value.shape)}")
    return value


def four_dims(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype is not torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    if not 2 <= value.dim() <= 4:
        raise ValueError(f"{name}: expected 2 to 4 dimensions, got shape {tuple(value.shape)}")
    return value[(None,) * (4 - value.dim())]


def check_batch(name: str, got: int, expected: int, what: str = "batch") -> None:
    if got not in (1, expected):
        raise ValueError(f"{name}: expected a {what} size of 1 or {expected}, got {got}")


def check_length(name: str, got: int, kv_len: int) -> None:
    if got != kv_len:
        raise ValueError(f"{name}: expected one entry per key, {kv_len}, got {got}")
