"""The arguments of the kernels: tuples of run-time values, and the static features."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flashmark.nystrom.call import Call

from ..block_sparse import configs as shared
from ..block_sparse.arguments import dot_precision, padded
from . import configs
from .primitives import LOG2E


class Problem(NamedTuple):
    """The integers of a launch, which kernels take one by one, as those of block-sparse attention.

    A stretch is `span` tokens of one sequence.
    """

    heads: int  # key heads
    parts: int  # programs that share a group of stretches: blocks of columns
    groups: int  # groups of stretches to a pair of sample and key head
    stretches: int
    units: int  # stretches of a group
    span: int
    tokens: int


class Stretches(NamedTuple):
    """The cut of a call's tokens into stretches. The tables are of packed sequences only."""

    span: int
    count: int  # to a pair of sample and key head
    table: Tensor | None  # (count, 3) int32: first token, end, sequence
    sequences: Tensor | None  # (S, 2) int32: first stretch, number of stretches


class Parameters(NamedTuple):
    """The landmarks, their core and decay, and the strides that kernels read them by."""

    lq: Tensor
    lk: Tensor
    core: Tensor
    decay: Tensor | None
    half2: Tensor | None  # (B | 1, H, M): s_ll / 2 in log2 units
    lq_strides: tuple[int, int, int]
    lk_strides: tuple[int, int, int]
    core_strides: tuple[int, int, int]
    decay_stride: int
    half_strides: tuple[int, int]
    scale: float
    scale2: float  # times log2(e)
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


class Saved(NamedTuple):
    """States in the form of the kernels, a line a stretch."""

    ref: Tensor  # (lines, PAD_M)
    tot: Tensor  # (lines, PAD_M)
    acc: Tensor  # (lines, PAD_M, PAD_V)


class Joined(NamedTuple):
    """Numbers a landmark of each slot, a line a slot: (lines, PAD_M)."""

    ref: Tensor  # of the state at its start
    tot: Tensor
    past: Tensor  # factors of `acc`: at the start of its stretch,
    new: Tensor  # and of what the stretch holds by itself
    left: Tensor  # e^{L at its start - L at its end}
    empty: Tensor  # (lines,): 1 where any landmark holds nothing at its start


class Stored(NamedTuple):
    """States of a backward. A slot is some tokens of a stretch."""

    saved: Saved  # at the start of each stretch
    ref: Tensor  # of each stretch by itself, (lines, PAD_M)
    tot: Tensor
    slots: Saved | None  # what a stretch holds by itself at the start of each slot
    joined: Joined | None


class Ends(NamedTuple):
    """States as users see them, incoming and outgoing."""

    L0: Tensor | None
    R0: Tensor | None
    L: Tensor
    R: Tensor


@dataclasses.dataclass(frozen=True)
class Features:
    """The static features that a kernel is compiled for."""

    MARKS: int  # landmarks whose states a program holds
    PAD_M: int
    DIM: int
    BLOCK_D: int
    BLOCKS_D: int
    DIM_V: int
    BLOCK_V: int
    PAD_V: int
    SLICES: int  # of the columns of values
    CHUNK: int
    GROUP: int
    MASS: bool
    DECAY: bool
    KEEP: bool
    PACKED: bool
    STATE: bool
    BFLOAT16: bool
    SPLIT: bool  # the core in two bfloat16
    SCAN: bool  # prefix sums by a scan: products are exact
    PRECISION: str
    ONE_PASS: bool = False
    SLOT: int = 0  # tokens between states that are stored within a stretch
    STEEP: bool = False  # chunks end where a score rises too far
    TAKES_STATES: bool = True  # what a launch of the backward is for: reverse states, the core,
    TAKES_CORE: bool = True
    TAKES_QUERIES: bool = True  # queries and landmark keys,
    TAKES_KEYS: bool = True  # keys and landmark queries,
    TAKES_VALUES: bool = True


class Inputs(NamedTuple):
    """A call, or one slice of the columns of its values, as kernels read it."""

    query: Tensor
    key: Tensor
    value: Tensor
    marks: Parameters
    keep: Tensor | None  # uint8 (B, N), or bool
    cu_seqlens: Tensor | None
    L0: Tensor | None
    R0: Tensor | None
    mass: bool

    @property
    def rows(self) -> int:
        """Lines of the state tensors to a key head."""
        batch = self.key.shape[0]
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def describe(call: Call) -> Inputs:
    lq, lk, core = call.landmark_queries, call.landmark_keys, call.core
    scale2 = call.scale * LOG2E.value
    half2, half_strides = None, (0, 0)
    if call.mass:
        half2 = (lq.float() * lk.float()).sum(-1) * (0.5 * scale2)
        half2 = half2.view(-1, *half2.shape[-2:])
        half_strides = (0 if half2.shape[0] == 1 else half2.stride(0), half2.stride(1))
    decay = None if call.decay is None else call.decay.contiguous()
    marks = Parameters(
        lq=lq,
        lk=lk,
        core=core,
        decay=decay,
        half2=half2,
        lq_strides=_by_sample(lq),
        lk_strides=_by_sample(lk),
        core_strides=_by_sample(core),
        decay_stride=0 if decay is None else decay.stride(0),
        half_strides=half_strides,
        scale=call.scale,
        scale2=scale2,
    )
    keep = None if call.key_mask is None else call.key_mask.contiguous().view(torch.uint8)
    L0, R0 = (None if x is None else x.float().contiguous() for x in (call.L0, call.R0))
    return Inputs(call.query, call.key, call.value, marks, keep, call.cu_seqlens, L0, R0, call.mass)


def features(call: Inputs, config: configs.Config, **extra: int) -> Features:
    query, value = call.query, call.value
    marks, dim, dim_v = call.marks.lq.shape[-2], query.shape[3], value.shape[3]
    block_d, block_v = min(config.block_d, padded(dim)), min(config.block_v, padded(dim_v))
    precision = dot_precision(query.dtype)
    return Features(
        MARKS=marks,
        PAD_M=padded(marks),
        DIM=dim,
        BLOCK_D=block_d,
        BLOCKS_D=triton.cdiv(dim, block_d),
        DIM_V=dim_v,
        BLOCK_V=block_v,
        PAD_V=triton.cdiv(dim_v, block_v) * block_v,
        SLICES=triton.cdiv(dim_v, block_v),
        CHUNK=config.chunk,
        GROUP=query.shape[1] // value.shape[1],
        MASS=call.mass,
        DECAY=call.marks.decay is not None,
        KEEP=call.keep is not None,
        PACKED=call.cu_seqlens is not None,
        STATE=call.L0 is not None,
        BFLOAT16=query.dtype == torch.bfloat16,
        SPLIT=query.dtype == torch.bfloat16,
        SCAN=precision == "ieee",
        PRECISION=precision,
        **extra,
    )


def choose_config(pass_: str, call: Inputs) -> configs.Config:
    widths = call.marks.lq.shape[-2], call.query.shape[3], call.value.shape[3]
    tokens = max(call.query.shape[2], call.key.shape[2])
    arch = shared.device_arch(call.query.device)
    return configs.choose(arch, pass_, call.query.dtype, *(padded(x) for x in widths), tokens)


def cut(call: Inputs, span: int, tokens: int) -> Stretches:
    """Stretches of `span` tokens. A packed sequence starts a new one; no size is read back."""
    if call.cu_seqlens is None:
        return Stretches(span, max(1, triton.cdiv(tokens, span)), None, None)
    bounds = call.cu_seqlens.long()
    starts, stops = bounds[:-1], bounds[1:]
    counts = (stops - starts + span - 1) // span
    ends = counts.cumsum(0)
    sequences = torch.stack([ends - counts, counts], 1).int()
    count = triton.cdiv(tokens, span) + starts.shape[0]  # at most; those left over are empty
    stretches = torch.arange(count, device=bounds.device)
    row = torch.searchsorted(ends, stretches, right=True)
    there = row < starts.shape[0]
    row = row.clamp(max=starts.shape[0] - 1)
    start = starts[row] + (stretches - sequences[row, 0]) * span
    stop = torch.minimum(start + span, stops[row])
    table = torch.stack([start, torch.where(there, stop, start), row], 1).int()
    return Stretches(span, count, table.contiguous(), sequences.contiguous())


def problem_of(
    call: Inputs, stretches: Stretches, parts: int, units: int = 1, tokens: int | None = None
) -> Problem:
    return Problem(
        heads=call.key.shape[1],
        parts=parts,
        groups=triton.cdiv(stretches.count, units),
        stretches=stretches.count,
        units=units,
        span=stretches.span,
        tokens=call.key.shape[2] if tokens is None else tokens,
    )


def new_states(call: Inputs, lines: int, F: Features, dtype=torch.float32) -> Saved:
    vectors = torch.empty(2, lines, F.PAD_M, dtype=torch.float32, device=call.query.device)
    acc = torch.empty(lines, F.PAD_M, F.PAD_V, dtype=dtype, device=call.query.device)
    return Saved(vectors[0], vectors[1], acc)


def new_rises(call: Inputs, stretches: Stretches, slots: int = 1) -> Tensor:
    """For each slot of a stretch the first token that rises too far, a note from one launch to the
    next.
    """
    lines = call.key.shape[0] * call.key.shape[1] * stretches.count * slots
    return torch.empty(lines, dtype=torch.int32, device=call.query.device)


def new_ends(call: Inputs, state_out: tuple[Tensor, Tensor] | None = None) -> Ends:
    """The states that come in, and memory for those that go out: that of `state_out` if given."""
    if state_out is not None:
        return Ends(call.L0, call.R0, *state_out)
    marks, heads, dim_v = call.marks.lq.shape[-2], call.key.shape[1], call.value.shape[3]
    L = torch.empty(call.rows, heads, marks, dtype=torch.float32, device=call.query.device)
    return Ends(call.L0, call.R0, L, L.new_empty(*L.shape, dim_v))


def new_output(call: Inputs) -> Tensor:
    return call.query.new_empty(*call.query.shape[:3], call.value.shape[3])


def new_token_gradients(call: Inputs, wide: bool) -> dict[str, Tensor]:
    dtype = torch.float32 if wide else call.query.dtype
    tokens = {"query": call.query, "key": call.key, "value": call.value}
    return {name: torch.empty(x.shape, dtype=dtype, device=x.device) for name, x in tokens.items()}


def _by_sample(x: Tensor) -> tuple[int, int, int]:
    """Batch, head and row stride of (H, ., .) or (B, H, ., .); 0 where samples share it."""
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])
