"""Choice of the chunk, tiles, warps and stages of a kernel: one frozen record and one function."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from flashmark import dispatch

from ..block_sparse import configs as shared

PASSES = ("states", "forward", "pieces", "decode", "rows", "keys", "read")
DECODE_TOKENS = 16  # a call of at most so many tokens is one program a head: one chunk


@dataclasses.dataclass(frozen=True)
class Config(shared.Runnable):
    """Tokens of a chunk, columns of values and of queries that a program holds, and how it runs."""

    chunk: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    shares: int = 1  # launches that a pass of the backward is cut into
    registers: int | None = None


_IN_USE: dict[str, Config] = {}


def using(**passes: Config) -> contextlib.AbstractContextManager[None]:
    """Run passes, by name, with these configs whatever the operands: for tests and measurements."""
    return shared.with_entries(_IN_USE, passes)


# 163 KiB of shared memory to a program, or more
ROOMY = (*(10 * major + minor for major, minor in dispatch.ROOMY), "cpu")
TWICE = (90, 100, 103, "cpu")  # 227 KiB: the same with two programs that load ahead
MOST_IN_CHUNKS = 128  # landmarks whose whole chunks fit; pieces, one after the other, take more


def choose(
    arch: int | str,
    pass_: str,
    dtype: torch.dtype,
    width: int,
    head_dim: int,
    v_dim: int,
    tokens: int,
) -> Config:
    """The config of a pass of `PASSES`.

    `arch` as from `device_arch`; `width`, `head_dim` and `v_dim` are padded to powers of two >= 16.
    A tile has a landmark a row, 64 of them to four warps, and registers to a thread in proportion
    to its columns: so the short chunks, and the launches that a wide backward is cut into. Exact
    float32 products keep their operands in registers: small tiles, and twice the warps. Small ones
    too where there is little shared memory.
    """
    if pass_ in _IN_USE:
        return _IN_USE[pass_]
    if dtype == torch.float32 or arch not in ROOMY:
        shares = {"rows": 3, "keys": 2}.get(pass_, 1)
        warps = 8 if dtype == torch.float32 else 4
        return Config(16, min(v_dim, 32), min(head_dim, 32), warps, 1, shares)
    backward, bfloat16 = pass_ in ("rows", "keys"), dtype == torch.bfloat16
    wide = max(width, head_dim, v_dim) > 64
    block_d = block_v = 64 if backward else 128
    if pass_ == "decode":
        block_d, block_v = 64 if width == 128 else 128, 64
    elif pass_ == "pieces" and v_dim <= 128:
        block_d, block_v = 64 if width == 128 else 128, 64
    elif pass_ == "forward" and width == 128 and head_dim > 128:
        block_d = 64
    if width == 128 and arch == 80 and (pass_ == "rows" or pass_ == "keys" and not bfloat16):
        block_d = 32  # the core, or float32 states, lie in 128 KiB of shared memory
    block_d, block_v = min(head_dim, block_d), min(v_dim, block_v)
    if backward and bfloat16 and not wide:
        chunk = 64
    elif backward or pass_ == "decode" or tokens <= DECODE_TOKENS and pass_ != "read":
        chunk = 16
    elif pass_ == "pieces":
        chunk = 16 if wide or not bfloat16 or width > max(head_dim, v_dim) else 32
    elif pass_ == "forward" and bfloat16 and width == 128 and max(head_dim, v_dim) <= 32:
        chunk = 64  # fewer tokens by so few columns would be multiplied by several warps alike
    elif pass_ == "forward" and (wide or not bfloat16):
        chunk = 16 if wide and not bfloat16 else 32
    elif pass_ == "read" and width > 64:
        chunk = 32
    else:
        chunk = 64 if bfloat16 else 32
    shares = 1
    if backward and (wide or not bfloat16 and max(width, head_dim, v_dim) > 32):
        shares = 3 if pass_ == "rows" and width > 64 else 2
    ahead = pass_ == "forward" and arch in TWICE and chunk > 16 and max(head_dim, v_dim) <= 128
    stages = 2 if ahead else 1
    return Config(chunk, block_v, block_d, 8 if width > 64 else 4, stages, shares)


SCAN_ROWS = 8  # landmarks of a program that walks all stretches of a sequence
FORWARD_SPAN = 2048  # tokens between states that are stored, at most
LEAST_SPAN = 128  # likewise where sequences are short
BACKWARD_SPAN = 1024  # likewise of the backward, at most
BACKWARD_SLOT = 64  # tokens of a slot: what stretches hold so far is stored at the start of each
BACKWARD_QUERIES = 32  # of a chunk, that the query side takes at a time: its tiles are many
BACKWARD_PIECE = 16  # tokens of a piece of the backward, at most
READ_SPAN = 256  # queries of a program, where all read one state
SERIAL_TOKENS = 512  # a sequence this short is one program's work anyway


def fills_device(where: torch.device, pairs: int, tokens: int) -> bool:
    """Can one pass, a program for a sample and key head, keep the device busy?"""
    return tokens <= SERIAL_TOKENS or pairs >= 2 * shared.processors(where)


def forward_span(where: torch.device, pairs: int, tokens: int) -> int:
    """Tokens between states of the forward: as many as leave about two programs, and at least 15 to
    8, to a multiprocessor: the scan over stretches is a chain.
    """
    span, wanted = FORWARD_SPAN, 15 * shared.processors(where) // 8
    while span > LEAST_SPAN and pairs * -(-tokens // span) < wanted:
        span //= 2
    return span


PROGRAMS = 1024  # of a backward kernel, or twice that: each leaves a share of the gradients


def backward_span(where: torch.device, pairs: int, tokens: int, width: int) -> tuple[int, int]:
    """Tokens of a stretch and of a slot of the backward: few stretches, for the scans over them,
    but enough to keep the device busy. States of up to 32 landmarks are small: short slots.
    """
    span = BACKWARD_SPAN
    slot = min(span, BACKWARD_SLOT if width > 32 else max(16, BACKWARD_SLOT // 2))
    while span > 2 * slot and pairs * tokens < 3 * span * shared.processors(where):
        span //= 2
    return span, slot


def stretches_of_a_program(stretches: int) -> int:
    """Stretches that a program walks one after another."""
    return max(1, stretches // PROGRAMS)


ROWS = "TAKES_STATES", "TAKES_CORE", "TAKES_QUERIES"
KEYS = "TAKES_KEYS", "TAKES_VALUES"


def launches(pass_: str, shares: int) -> list[dict[str, bool]]:
    """Fields of `Features` for each launch of a backward pass that is cut into `shares`."""
    names = ROWS if pass_ == "rows" else KEYS
    cuts = {1: (names,), 2: (names[:-1], names[-1:]), 3: tuple((x,) for x in names)}[shares]
    return [{name: name in cut for name in names} for cut in cuts]
