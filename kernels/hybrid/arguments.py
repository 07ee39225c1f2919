"""Run-time arguments and compile-time features of the kernels."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..block_sparse.arguments import dot_precision, padded
from . import configs

LOG2E = 1.4426950408889634


class LaunchSizes(NamedTuple):
    """The integers of a launch. A program takes `units` chunks of a pair, and one block of columns
    out of `parts`."""

    heads: int
    parts: int
    groups: int
    units: int
    chunks: int
    width: int  # tokens of a chunk
    keep_tokens: int


class Operands(NamedTuple):
    """Tokens are (B, H, C, w, *); strides are those of the first four dimensions."""

    key: Tensor
    value: Tensor
    landmarks: Tensor
    keep: Tensor | None  # uint8 (B, C, w)
    key_strides: tuple[int, int, int, int]
    value_strides: tuple[int, int, int, int]
    landmark_strides: tuple[int, int, int]  # the first 0 where samples share them
    scale: float
    scale2: float  # times log2(e)
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


@dataclasses.dataclass(frozen=True)
class Features:
    """Compile-time features of a kernel; the Nyström kernels' functions read these names."""

    MARKS: int
    PAD_M: int
    DIM: int
    BLOCK_D: int
    BLOCKS_D: int
    DIM_V: int
    BLOCK_V: int
    BLOCKS_V: int
    CHUNK: int  # tokens of a tile
    KEEP: bool
    RELOAD: bool  # whether landmarks are loaded for every tile
    BFLOAT16: bool
    PRECISION: str


def operands(key, value, landmarks, keep, scale) -> Operands:
    steps = landmarks.stride()[:-1]
    return Operands(
        key=key,
        value=value,
        landmarks=landmarks,
        keep=None if keep is None else keep.contiguous().view(torch.uint8),
        key_strides=key.stride()[:4],
        value_strides=value.stride()[:4],
        landmark_strides=steps if landmarks.dim() == 4 else (0, *steps),
        scale=scale,
        scale2=scale * LOG2E,
    )


def features(x: Operands, config: configs.Config) -> Features:
    block = config.block
    dim, dim_v, marks = x.key.shape[4], x.value.shape[4], x.landmarks.shape[-2]
    block_d, block_v = (min(block, padded(n)) for n in (dim, dim_v))
    return Features(
        MARKS=marks,
        PAD_M=padded(marks),
        DIM=dim,
        BLOCK_D=block_d,
        BLOCKS_D=triton.cdiv(dim, block_d),
        DIM_V=dim_v,
        BLOCK_V=block_v,
        BLOCKS_V=triton.cdiv(dim_v, block_v),
        CHUNK=min(config.tile, padded(x.key.shape[3])),
        KEEP=x.keep is not None,
        RELOAD=config.reload,
        BFLOAT16=x.key.dtype == torch.bfloat16,
        PRECISION=dot_precision(x.key.dtype),
    )


def sizes_of(x: Operands, F: Features, units: int = 1) -> LaunchSizes:
    _, heads, chunks, width, _ = x.key.shape
    return LaunchSizes(
        heads=heads,
        parts=max(F.BLOCKS_D, F.BLOCKS_V),
        groups=triton.cdiv(chunks, units),
        units=units,
        chunks=chunks,
        width=width,
        keep_tokens=chunks * width,
    )


def choose_config(pass_: str, x: Operands) -> configs.Config:
    dim = max(x.key.shape[4], x.value.shape[4])
    marks = padded(x.landmarks.shape[-2])
    return configs.choose(pass_, x.key.device, x.key.dtype, marks, padded(dim))
