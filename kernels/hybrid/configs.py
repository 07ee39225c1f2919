"""Tiles and warps of each kernel, chosen by offline compilation for sm_90."""

from __future__ import annotations

import dataclasses

import torch

from ..block_sparse import configs as shared
from ..nystrom.configs import ROOMY, TWICE

PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Config(shared.Runnable):
    """Tokens of a tile, columns that a program sums, and how it runs."""

    tile: int
    block: int
    num_warps: int
    num_stages: int
    reload: bool = False  # landmarks for every tile: more than shared memory holds
    # core^T x is (x^T core)^T, in bfloat16 whatever the dtype: products of a warp that read a core
    # from either side need it twice in shared memory
    right: bool = False


def choose(pass_: str, where: torch.device, dtype: torch.dtype, marks: int, dim: int) -> Config:
    """The config of a pass of `PASSES`. `marks`, and `dim` as the wider of keys and values, are
    padded to powers of two >= 16.
    """
    bfloat16, wide = dtype == torch.bfloat16, max(marks, dim) > 64
    arch = shared.device_arch(where)
    tight = arch not in ROOMY or dtype == torch.float32 and arch not in TWICE
    if pass_ == "forward":
        if tight and marks * dim > 64 * 128:
            reload = dtype == torch.float32 and marks * dim > 128 * 128 and arch not in ROOMY
            return Config(32 if bfloat16 else 16, 64, 8, 1, reload)
        block = 128 if bfloat16 and marks <= 64 else 64
        return Config(64 if bfloat16 else 32, block, 8 if wide or not bfloat16 else 4, 2)
    block = 32 if dim > 128 or (marks > 64 and (dim > 64 or tight)) else 64
    tile = (32 if wide else 64) if bfloat16 else 16
    return Config(tile, block, 8, 1)


@dataclasses.dataclass(frozen=True)
class StepConfig(shared.Runnable):
    """Held tokens and landmarks of a tile of a decoding step, and how it runs."""

    tokens: int
    marks: int
    num_warps: int
    num_stages: int


def choose_step(dtype: torch.dtype, marks: int, dim: int) -> StepConfig:
    """The config of a step; `marks` and the wider of `dim` and `v_dim` are padded."""
    if dtype == torch.float32:  # exact products keep their operands in registers
        return StepConfig(16, 16, 8, 1)
    return StepConfig(64, 32, 8 if max(marks, dim) > 64 else 4, 2)


PROGRAMS = 1024  # of a backward: each leaves a share of the gradients of parameters


def choose_mass(
    pass_: str, where: torch.device, dtype: torch.dtype, marks: int, dim: int, v_dim: int
) -> Config:
    """The config of a pass that reads the far field of merge="mass"; widths are padded."""
    bfloat16, wide = dtype == torch.bfloat16, max(marks, dim, v_dim) > 64
    arch = shared.device_arch(where)
    # a core in bfloat16 and what it lost take 64 of 99 KiB
    tight = marks > 64 and arch not in ROOMY
    if pass_ == "forward":
        tile = 64 if bfloat16 and marks <= 64 else 16 if tight and dtype == torch.float32 else 32
        block = 16 if tight and dtype == torch.float32 else 32 if tight else 64
        return Config(tile, block, 8 if wide or not bfloat16 else 4, 1)
    block = 64  # less where the core leaves less shared memory
    if marks > 64 and (dtype == torch.float32 or arch not in TWICE):
        block = 32 if arch in ROOMY and dtype != torch.float16 else 16
    tile = 32 if bfloat16 and marks > 32 and arch in TWICE else 16
    warps = 4 if bfloat16 and marks <= 64 else 8
    return Config(tile, block, warps, 1, right=tight and dtype != torch.float32)
