"""Which chunk, tiles, warps and stages a kernel runs with: one frozen record and one function."""

from __future__ import annotations

import dataclasses

import torch

from ..block_sparse.configs import processors

PASSES = ("states", "forward", "decode", "rows", "keys", "read")
MAX_LANDMARKS = 128  # on a GPU
DECODE_TOKENS = 16  # a call of at most so many tokens is one program a head: one chunk


@dataclasses.dataclass(frozen=True)
class Config:
    """Tokens of a chunk, columns of values and of queries that a program holds, and how it runs."""

    chunk: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


def choose(
    pass_: str, dtype: torch.dtype, width: int, head_dim: int, v_dim: int, tokens: int
) -> Config:
    """The config of a pass of `PASSES`.

    `width`, `head_dim` and `v_dim` are padded to powers of two >= 16. Half a chunk, and columns of
    queries in parts, are what keeps wide float32 operands and wide backwards in shared memory.
    """
    backward = pass_ in ("rows", "keys")
    wide = max(width, head_dim, v_dim) > 64
    block_d = min(head_dim, 64 if backward or width > 128 or dtype == torch.float32 else 128)
    block_v = min(v_dim, 64 if width > 128 or pass_ == "decode" else 128)
    chunk = 64
    if dtype != torch.bfloat16 or width > 128:
        chunk = 16 if backward and (wide or dtype == torch.float32) else 32
    elif backward and wide:
        chunk = 32
    if tokens <= DECODE_TOKENS and pass_ != "read":
        chunk = 16
    return Config(chunk, block_v, block_d, num_warps=8 if wide else 4, num_stages=1)


def why_not(device: torch.device, marks: int) -> str | None:
    """Why no config fits this many landmarks; the interpreter has no limit."""
    if device.type == "cuda" and marks > MAX_LANDMARKS:
        return (
            f"landmarks: expected at most {MAX_LANDMARKS} of them with the Triton kernels on a GPU "
            f"(their core must fit in shared memory), got {marks}"
        )
    return None


FORWARD_SPAN = 512  # tokens between states that are stored
BACKWARD_SPAN = 256  # likewise; the backward walks again from one to each of its chunks
READ_SPAN = 256  # queries of a program, where all read one state
SERIAL_TOKENS = 512  # a sequence this short is one program's work anyway


def fills_device(device: torch.device, pairs: int, tokens: int) -> bool:
    """Can one pass, a program for a sample and key head, keep the device busy?"""
    return tokens <= SERIAL_TOKENS or pairs >= 2 * processors(device)


PROGRAMS = 1024  # of a backward kernel: each leaves a share of the parameter gradients


def slots_of_a_program(slots: int) -> int:
    return max(1, slots // PROGRAMS)
