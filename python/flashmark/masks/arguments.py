"""Checks of users' arguments to masks; errors name the argument, the expected and the given."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor

#: what a mask can be compiled for
BLOCK_SIZES = (16, 32, 64, 128)


#: larger than any length; bounds up to here never overflow where positions are added to them
NO_BOUND = 1 << 61


def check_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(block_size) if isinstance(block_size, list | tuple) else (block_size, block_size)
    if len(pair) != 2 or not all(_is_integer(n) and n > 0 for n in pair):
        raise ValueError(
            f"block_size: expected a positive int or a pair of them, got {block_size!r}"
        )
    return operator.index(pair[0]), operator.index(pair[1])


def _is_integer(value: Any) -> bool:
    """An int of Python or NumPy, or one that torch traces as a symbol."""
    integral = isinstance(value, int | torch.SymInt | numbers.Integral)
    return integral and not isinstance(value, bool)


def integer(name: str, value: int, least: int) -> int:
    if not _is_integer(value):
        raise TypeError(f"{name}: expected an int >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    return min(operator.index(value), NO_BOUND)


def not_a_mask(name: str, value: Any, expected: str) -> TypeError:
    """The error of an argument that should have been a mask, and what turns it into one."""
    got, hint = type(value).__name__, ""
    if hasattr(value, "kv_indices") and hasattr(value, "mask_mod"):
        got, hint = "a FlexAttention BlockMask", "; masks.from_flex converts it"
    elif isinstance(value, Tensor):
        got, hint = f"a {value.dtype} tensor", "; masks.dense makes a mask of a bool tensor"
    elif callable(value) and not isinstance(value, type):
        got, hint = f"a function ({got})", "; masks.mask_mod makes a mask of it"
    return TypeError(f"{name}: expected {expected}, got {got}{hint}")


def integer_tensor(name: str, value: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    if value.dim() not in dims:
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected {allowed} dimension(s), got shape {tuple(value.shape)}")
    return value


def bool_tensor(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype is not torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    if not 2 <= value.dim() <= 4:
        raise ValueError(f"{name}: expected 2 to 4 dimensions, got shape {tuple(value.shape)}")
    return value


def four_dims(value: Tensor) -> Tensor:
    return value[(None,) * (4 - value.dim())]


def check_batch(name: str, got: int, expected: int, what: str = "batch") -> None:
    if got not in (1, expected):
        raise ValueError(f"{name}: expected a {what} size of 1 or {expected}, got {got}")


def check_length(name: str, got: int, kv_len: int) -> None:
    if got != kv_len:
        raise ValueError(f"{name}: expected one entry per key, {kv_len}, got {got}")
