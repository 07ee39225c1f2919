"""One token a sample after a state, which moves on in place: two launches, whatever the merge.

The first computes the outputs and all that belongs to one key head; the second what the heads of a
sample share, since they read it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashmark.hybrid.call import Call

from ..block_sparse.arguments import dot_precision, on_device, padded
from ..nystrom.primitives import full, zeros
from . import configs
from .arguments import LOG2E
from .far_step import read_features, scan_landmarks, step_far
from .step_primitives import add_keys, one_of


class Operands(NamedTuple):
    """Inputs of a step; strides are those of (B, H), and of (B, H, M), 0 where samples share."""

    query: Tensor
    key: Tensor
    value: Tensor
    lq: Tensor
    lk: Tensor
    core: Tensor | None
    gate: Tensor | None  # (B, Hq, 1, 1)
    keep: Tensor | None  # uint8 (B, 1): whether the key takes part
    active: Tensor | None  # uint8 (B,): whether the sample has a token at all
    query_strides: tuple[int, int]
    key_strides: tuple[int, int]
    value_strides: tuple[int, int]
    lq_strides: tuple[int, int, int]
    lk_strides: tuple[int, int, int]
    core_strides: tuple[int, int, int]
    gate_strides: tuple[int, int]
    scale2: float  # times log2(e)
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


class State(NamedTuple):
    """The tensors of a HybridState, contiguous. `far_counts` is L with merges "mass" and "gate"."""

    position: Tensor
    keep: Tensor  # uint8
    key: Tensor
    value: Tensor
    far_counts: Tensor
    far_keys: Tensor | None
    far_values: Tensor


@dataclasses.dataclass(frozen=True)
class Features:
    """Compile-time features of a kernel, named as in the Nyström kernels."""

    MERGE: str
    MARKS: int
    PAD_M: int
    BLOCK_M: int  # landmarks of a tile
    DIM: int
    PAD_D: int
    BLOCK_D: int  # columns of the landmarks that all are read at once
    DIM_V: int
    PAD_V: int
    GROUP: int
    PAD_G: int
    BLOCK: int  # held tokens of a tile
    KEEP: bool
    ACTIVE: bool
    BFLOAT16: bool
    PRECISION: str


@triton.jit
def load_queries(inputs, b, h, F: tl.constexpr):
    """The queries of a group of heads, [PAD_G, PAD_D]."""
    offs_g, offs_d = tl.arange(0, F.PAD_G), tl.arange(0, F.PAD_D)
    heads = tl.cast(h * F.GROUP + offs_g, tl.int64)
    ptr = inputs.query + tl.cast(b, tl.int64) * inputs.query_strides[0]
    ptrs = ptr + (heads * inputs.query_strides[1])[:, None] + offs_d[None, :]
    inside = (offs_g < F.GROUP)[:, None] & (offs_d < F.DIM)[None, :]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def merged(near, far, gate_ptr, inputs, F: tl.constexpr):
    """The output, [PAD_G, PAD_V]; `near` and `far` are (reference, mass, numerator) of rows."""
    top, total, acc = near
    reference, mass, numerator = far
    if F.MERGE == "mass":
        there = mass > 0.0
        higher = tl.maximum(top, tl.where(there, reference, float("-inf")))
        higher = tl.where(higher == float("-inf"), 0.0, higher)
        own = tl.exp2(top - higher)
        other = tl.where(there, tl.exp2(tl.where(there, reference - higher, 0.0)), 0.0)
        total = own * total + other * tl.where(there, mass, 0.0)
        acc = own[:, None] * acc + tl.where(there[:, None], other[:, None] * numerator, 0.0)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if F.MERGE == "gate":
        offs_g = tl.arange(0, F.PAD_G)
        ptrs = gate_ptr + offs_g * inputs.gate_strides[1]
        gate = tl.load(ptrs, mask=offs_g < F.GROUP, other=1.0).to(tl.float32)
        gate = tl.where(mass > 0.0, gate, 1.0)[:, None]
        out = gate * out + (1.0 - gate) * numerator
    return out


@triton.jit
def store_output(out_ptr, pair, out, F: tl.constexpr):
    """Store the output of a group of heads, [PAD_G, PAD_V]."""
    offs_g, offs_v = tl.arange(0, F.PAD_G), tl.arange(0, F.PAD_V)
    ptrs = out_ptr + (pair * F.GROUP + offs_g)[:, None] * F.DIM_V + offs_v[None, :]
    inside = (offs_g < F.GROUP)[:, None] & (offs_v < F.DIM_V)[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def end_chunk(held_ptr, window, DIM: tl.constexpr, PAD: tl.constexpr, F: tl.constexpr):
    """Held tokens at a chunk's end: the current chunk becomes the one before."""
    offs, cols = tl.arange(0, F.BLOCK), tl.arange(0, PAD)
    for r0 in range(0, window, F.BLOCK):
        rows = r0 + offs
        at = rows.to(tl.int64)[:, None] * DIM + cols[None, :]
        there = (rows < window)[:, None] & (cols < DIM)[None, :]
        # [BLOCK, PAD]
        chunk = tl.load(held_ptr + window * DIM + at, mask=there, other=0.0)
        tl.store(held_ptr + at, chunk, mask=there)


@triton.jit(do_not_specialize=["heads", "window"])
def step_kernel(inputs, state, out_ptr, heads, window, F: tl.constexpr):
    pair = tl.program_id(0)
    b, h = pair // heads, pair % heads
    pair64 = tl.cast(pair, tl.int64)
    offs_d, offs_v = tl.arange(0, F.PAD_D), tl.arange(0, F.PAD_V)
    if F.ACTIVE:
        if tl.load(inputs.active + b) == 0:
            store_output(out_ptr, pair64, zeros(F.PAD_G, F.PAD_V), F)
            return
    position = tl.load(state.position + b)
    inside = (position % window).to(tl.int32)
    ends = inside + 1 == window
    kept = one_of(inputs.keep, b, F)
    # [PAD_D] and [PAD_V]
    k_ptr = inputs.key + tl.cast(b, tl.int64) * inputs.key_strides[0] + h * inputs.key_strides[1]
    k = tl.load(k_ptr + offs_d, mask=(offs_d < F.DIM) & kept, other=0.0)
    v_ptr = inputs.value + tl.cast(b, tl.int64) * inputs.value_strides[0]
    v_ptr += h * inputs.value_strides[1]
    v = tl.load(v_ptr + offs_v, mask=(offs_v < F.DIM_V) & kept, other=0.0)
    # [PAD_G, PAD_D]
    q = load_queries(inputs, b, h, F)

    # one softmax over this token, the held ones and, with "slots", what the landmarks keep
    # [PAD_G]
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * inputs.scale2
    top = tl.where(kept, own, float("-inf"))
    total = tl.where(kept, 1.0, 0.0) + full(F.PAD_G, 0.0)
    # [PAD_G, PAD_V]
    acc = v.to(tl.float32)[None, :] + zeros(F.PAD_G, F.PAD_V)
    held_k = state.key + pair64 * 2 * window * F.DIM
    held_v = state.value + pair64 * 2 * window * F.DIM_V
    row = (window + inside).to(tl.int64)  # after those that are read
    tl.store(held_k + row * F.DIM + offs_d, k, mask=offs_d < F.DIM)
    tl.store(held_v + row * F.DIM_V + offs_v, v, mask=offs_v < F.DIM_V)
    keep_ptr = state.keep + tl.cast(b, tl.int64) * 2 * window
    near = add_keys(q, held_k, held_v, keep_ptr, tl.where(position < window, window, 0),
                    window + inside, (top, total, acc), inputs.scale2, F)  # fmt: skip
    if ends:
        tl.debug_barrier()  # all have read the chunk before, and the token is held
        end_chunk(held_k, window, F.DIM, F.PAD_D, F)
        end_chunk(held_v, window, F.DIM_V, F.PAD_V, F)
    features = read_features(inputs, b, h, F)
    scan = scan_landmarks(inputs, state, k, b, h, pair64, F)
    near, far = step_far(inputs, state, q, k, v, kept, features, scan, near, b, h, pair64, ends, F)
    gate_ptr = inputs.gate
    if F.MERGE == "gate":
        gate_ptr += tl.cast(b, tl.int64) * inputs.gate_strides[0]
        gate_ptr += h * F.GROUP * inputs.gate_strides[1]
    store_output(out_ptr, pair64, merged(near, far, gate_ptr, inputs, F), F)


@triton.jit(do_not_specialize=["window"])
def advance_kernel(inputs, state, window, F: tl.constexpr):
    """Position of a sample, and which of its held tokens take part."""
    b = tl.program_id(0)
    if F.ACTIVE:
        if tl.load(inputs.active + b) == 0:
            return
    position = tl.load(state.position + b)
    inside = (position % window).to(tl.int32)
    kept = one_of(inputs.keep, b, F).to(tl.uint8)
    keep_ptr = state.keep + tl.cast(b, tl.int64) * 2 * window
    ends = inside + 1 == window
    offs = tl.arange(0, F.BLOCK)
    if ends:
        for r0 in range(0, window, F.BLOCK):
            rows = r0 + offs
            current = tl.load(keep_ptr + window + rows, mask=rows < window, other=0)
            tl.debug_barrier()  # several threads read an element that one of them overwrites
            tl.store(keep_ptr + rows, current, mask=rows < window - 1)
            tl.store(keep_ptr + window + rows, tl.zeros_like(current), mask=rows < window)
    tl.debug_barrier()
    tl.store(keep_ptr + tl.where(ends, window - 1, window + inside), kept)
    tl.store(state.position + b, position + 1)


def step(call: Call, active: Tensor | None) -> Tensor:
    """The output of one token a sample; the state of the call moves on in place.

    Where `active`, bool (B,), is False a sample has no token: its state stays, its output is 0.
    """
    batch, heads, _, _ = call.key.shape
    out = call.query.new_empty(*call.query.shape[:3], call.value.shape[3])
    if not out.numel():
        return out
    wide = padded(max(call.key.shape[3], call.value.shape[3]))
    config = configs.choose_step(call.key.dtype, padded(call.landmark_queries.shape[-2]), wide)
    F = features_of(call, active, config)
    inputs, state = operands_of(call, active), state_of(call)
    with on_device(call.query):
        step_kernel[(batch * heads,)](inputs, state, out, heads, call.window, F, **config.options)
        advance_kernel[(batch,)](inputs, state, call.window, F, num_warps=1)
    return out


def state_of(call: Call) -> State:
    assert call.position is not None and call.keep is not None
    assert call.held_keys is not None and call.held_values is not None
    assert call.far_counts is not None and call.far_values is not None
    return State(
        call.position, call.keep.view(torch.uint8), call.held_keys, call.held_values,
        call.far_counts, call.far_keys, call.far_values,
    )  # fmt: skip


def operands_of(call: Call, active: Tensor | None) -> Operands:
    gate = call.gate
    if gate is not None:
        gate = gate.expand(*call.query.shape[:2], 1, 1)
    return Operands(
        query=call.query,
        key=call.key,
        value=call.value,
        lq=call.landmark_queries,
        lk=call.landmark_keys,
        core=call.core,
        gate=gate,
        keep=None if call.key_mask is None else call.key_mask.contiguous().view(torch.uint8),
        active=None if active is None else active.contiguous().view(torch.uint8),
        query_strides=call.query.stride()[:2],
        key_strides=call.key.stride()[:2],
        value_strides=call.value.stride()[:2],
        lq_strides=_by_sample(call.landmark_queries),
        lk_strides=_by_sample(call.landmark_keys),
        core_strides=(0, 0, 0) if call.core is None else _by_sample(call.core),
        gate_strides=(0, 0) if gate is None else gate.stride()[:2],
        scale2=call.scale * LOG2E,
    )


def features_of(call: Call, active: Tensor | None, config: configs.StepConfig) -> Features:
    marks, dim, dim_v = call.landmark_queries.shape[-2], call.key.shape[3], call.value.shape[3]
    group = call.query.shape[1] // call.key.shape[1]
    return Features(
        MERGE=call.merge,
        MARKS=marks,
        PAD_M=padded(marks),
        BLOCK_M=min(config.marks, padded(marks)),
        DIM=dim,
        PAD_D=padded(dim),
        BLOCK_D=min(64, padded(dim)),
        DIM_V=dim_v,
        PAD_V=padded(dim_v),
        GROUP=group,
        PAD_G=padded(group),
        BLOCK=min(config.tokens, padded(call.window)),
        KEEP=call.key_mask is not None,
        ACTIVE=active is not None,
        BFLOAT16=call.key.dtype == torch.bfloat16,
        PRECISION=dot_precision(call.key.dtype),
    )


def _by_sample(x: Tensor) -> tuple[int, int, int]:
    """Batch, head and row stride of (H, ., .) or (B, H, ., .); 0 where samples share it."""
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])
