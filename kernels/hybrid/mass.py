"""Reads of the far field with merge "mass", with the interface of `flashmark.hybrid.eager`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import dot_precision, on_device, padded
from ..nystrom.primitives import (
    LN2,
    LOG2E,
    full,
    landmark_products,
    load_core,
    load_landmarks,
    load_rows,
    load_vector,
    locate,
    mm,
    mm_acc,
    operand,
    split,
    store_rows,
    turned_features,
    zeros,
)
from ..nystrom.reading import (
    core_mm,
    core_parts,
    landmark_dots,
    load_marks,
    own_columns,
    own_tokens,
    times_core,
)
from . import configs
from .primitives import chunk_of, slot_rows


class LaunchSizes(NamedTuple):
    """The integers of a launch. A program takes `units` chunks of a pair, and one block of the
    columns of queries, or of values, out of `parts`."""

    heads: int
    parts: int
    groups: int
    units: int
    chunks: int
    width: int


class Operands(NamedTuple):
    """Inputs of a query. Query strides are those of (B, Hq, C, w); the batch stride of parameters
    is 0 where samples share them."""

    query: Tensor
    landmarks: Tensor
    core: Tensor
    half2: Tensor  # (B | 1, Hkv, M): scale |x_l|^2 / 2 in log2 units
    L: Tensor  # (B, Hkv, C, M), contiguous
    R: Tensor  # (B, Hkv, C, M, Dv), contiguous
    query_strides: tuple[int, int, int, int]
    landmark_strides: tuple[int, int, int]
    core_strides: tuple[int, int, int]
    half_batch: int
    scale: float
    scale2: float
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


@dataclasses.dataclass(frozen=True)
class Features:
    """Compile-time features of a kernel, named as in the Nyström kernels."""

    MARKS: int
    PAD_M: int
    DIM: int
    BLOCK_D: int
    BLOCKS_D: int
    DIM_V: int
    BLOCK_V: int
    CHUNK: int
    GROUP: int
    BFLOAT16: bool
    SPLIT: bool
    RIGHT: bool  # whether the core is the right operand of products with either side of it
    PRECISION: str
    MASS: bool = True
    SLOT: int = 1  # tokens are addressed by their times: offsets do not sit in registers


@triton.jit
def parameters(inputs, b, h, F: tl.constexpr):
    """(pointer of the landmarks, their first block of columns, core, half2) of a pair."""
    x_ptr = chunk_of(inputs.landmarks, inputs.landmark_strides, b, h, 0)
    core_ptr = chunk_of(inputs.core, inputs.core_strides, b, h, 0)
    # [BLOCK_D, PAD_M]
    x = load_landmarks(x_ptr, inputs.landmark_strides[2], 0, inputs.query.dtype.element_ty, F)
    # [PAD_M]
    half2 = load_vector(inputs.half2 + b * inputs.half_batch + h * F.MARKS, F)
    return x_ptr, x, load_core(core_ptr, inputs.core_strides[2], F), half2


@triton.jit
def held_mass(inputs, line, half2, F: tl.constexpr):
    """(exp(L_l - h_l - top), top in log2 units) of a chunk; 0 where nothing is held."""
    offs_m = tl.arange(0, F.PAD_M)
    # [PAD_M]
    L = tl.load(inputs.L + line * F.MARKS + offs_m, mask=offs_m < F.MARKS, other=float("-inf"))
    held = L * LOG2E - half2
    top = tl.max(held, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp2(held - top), top


@triton.jit
def read_tile(q_ptr, t0, there, x, x_ptr, core, half2, inputs, F: tl.constexpr):
    """(F, F core, their row's reference) of a tile of queries, [CHUNK, PAD_M] and [CHUNK]."""
    # [CHUNK, PAD_M]
    dots = landmark_products(q_ptr, t0, inputs.query_strides[3], there, x, x_ptr,
                             inputs.landmark_strides[2], F)  # fmt: skip
    f = dots * inputs.scale2 - half2[None, :]
    f = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], f, float("-inf"))
    # [CHUNK]
    highest = tl.max(f, 1)
    e = tl.exp2(f - highest[:, None])
    return e, times_core(e, core, F), highest


@triton.jit(do_not_specialize=LaunchSizes._fields)
def mass_kernel(inputs, numerator_ptr, mass_ptr, reference_ptr, heads, parts, groups, units, chunks,
                width, F: tl.constexpr):  # fmt: skip
    sizes = LaunchSizes(heads, parts, groups, units, chunks, width)
    part, chunk, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    line = tl.cast(pair, tl.int64) * sizes.chunks + chunk
    x_ptr, x, core, half2 = parameters(inputs, b, h, F)
    held, top = held_mass(inputs, line, half2, F)
    ptrs, inside = slot_rows(inputs.R, line, part, F.DIM_V, F.BLOCK_V, F)
    # [PAD_M, BLOCK_V]
    R = tl.load(ptrs, mask=inside, other=0.0)
    v0 = part * F.BLOCK_V
    for g in range(F.GROUP):
        q_ptr = chunk_of(inputs.query, inputs.query_strides, b, h * F.GROUP + g, chunk)
        row = ((tl.cast(pair, tl.int64) * F.GROUP + g) * sizes.chunks + chunk) * sizes.width
        for t0 in range(0, sizes.width, F.CHUNK):
            offs = t0 + tl.arange(0, F.CHUNK)
            there = offs < sizes.width
            # [CHUNK, PAD_M] and [CHUNK]
            _, G, highest = read_tile(q_ptr, t0, there, x, x_ptr, core, half2, inputs, F)
            # [CHUNK, PAD_M]
            U = G * held[None, :]
            store_rows(numerator_ptr + row * F.DIM_V + v0, t0, F.DIM_V, there, F.DIM_V - v0,
                       mm(U, R, F), F.CHUNK, F.BLOCK_V, True)  # fmt: skip
            first = there & (part == 0)
            tl.store(mass_ptr + row + offs, tl.sum(U, 1), mask=first)
            tl.store(reference_ptr + row + offs, (highest + top) * LN2, mask=first)


@triton.jit
def turned_parameters(inputs, b, h, F: tl.constexpr):
    """(pointer of the landmarks, their stride, their first block of columns, core as `core_mm`
    takes it, half2) of a pair, with a landmark a row.
    """
    ptr = chunk_of(inputs.landmarks, inputs.landmark_strides, b, h, 0)
    stride = inputs.landmark_strides[2]
    core_ptr = chunk_of(inputs.core, inputs.core_strides, b, h, 0)
    core = core_parts(load_core(core_ptr, inputs.core_strides[2], F), F)
    # [PAD_M, BLOCK_D]
    x = load_marks(ptr, stride, 0, inputs.query.dtype.element_ty, F)
    half2 = load_vector(inputs.half2 + b * inputs.half_batch + h * F.MARKS, F)
    return ptr, stride, x, core, half2


@triton.jit
def turned_core_mm(core, b, F: tl.constexpr):
    """core^T b."""
    if F.RIGHT:
        high, low = core
        b_high, b_low = split(tl.trans(b))
        product = tl.dot(b_high, low, tl.dot(b_low, high))
        product = tl.trans(tl.dot(b_high, high, product))
    else:
        product = core_mm(core, b, True, F)
    return product


@triton.jit
def over_landmarks(x, d, F: tl.constexpr):
    """x^T d, [BLOCK_D, CHUNK], whose terms cancel where entries of the core are large."""
    x = tl.trans(x)
    if F.BFLOAT16:
        high, low = split(d)
        product = tl.dot(x, high, tl.dot(x, low))
    else:
        product = mm(x, d, F)
    return product


@triton.jit(do_not_specialize=LaunchSizes._fields)
def mass_backward_kernel(inputs, dnumerator_ptr, dmass_ptr, dq_ptr, dL_ptr, dR_ptr, dx_ptr,
                         dcore_ptr, dhalf_ptr, heads, parts, groups, units, chunks, width,
                         F: tl.constexpr):  # fmt: skip
    """U = G held, dU = R dnumerator^T + dmass, dG = dU held, dreading = F (core dG)."""
    sizes = LaunchSizes(heads, parts, groups, units, chunks, width)
    part, group, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    marks = turned_parameters(inputs, b, h, F)
    core, half2 = marks[3], marks[4]
    dx = zeros(F.PAD_M, F.BLOCK_D)
    # [PAD_M, PAD_M]
    dcore = zeros(F.PAD_M, F.PAD_M)
    # [PAD_M]
    dhalf = full(F.PAD_M, 0.0)
    d0 = part * F.BLOCK_D
    offs_m = tl.arange(0, F.PAD_M)
    first, last = group * sizes.units, tl.minimum((group + 1) * sizes.units, sizes.chunks)
    for chunk in tl.range(first, last, disable_licm=True):  # hoisted operands would fill registers
        line = tl.cast(pair, tl.int64) * sizes.chunks + chunk
        held, top = held_mass(inputs, line, half2, F)
        start = line * (F.MARKS * F.DIM_V)  # so that offsets within the tile take 32 bits
        ptrs, inside = slot_rows(inputs.R + start, 0, 0, F.DIM_V, F.BLOCK_V, F)
        # [PAD_M, BLOCK_V]
        R = operand(tl.load(ptrs, mask=inside, other=0.0), F)
        dR = zeros(F.PAD_M, F.BLOCK_V)
        # [PAD_M]
        pull = full(F.PAD_M, 0.0)
        for g in range(F.GROUP):
            for t0 in tl.range(0, sizes.width, F.CHUNK, disable_licm=True):
                there = t0 + tl.arange(0, F.CHUNK) < sizes.width
                # pointers seem to depend on t0 >= 0: else they would sit in registers
                none = tl.minimum(t0, 0)
                late, at = (marks[0] + none, marks[1], marks[2]), chunk
                if F.PAD_M > 64:
                    at += none
                q_ptr = chunk_of(inputs.query, inputs.query_strides, b, h * F.GROUP + g, at)
                queries = q_ptr, inputs.query_strides[3]
                row = ((tl.cast(pair, tl.int64) * F.GROUP + g) * sizes.chunks + at) * sizes.width
                # [PAD_M, CHUNK]
                dots, q = landmark_dots(queries, t0, there, late, F)
                e = turned_features(dots, half2, inputs, F)
                U = turned_core_mm(core, e, F) * held[:, None]
                # [CHUNK, BLOCK_V] and [CHUNK]
                dn = load_rows(dnumerator_ptr, row + t0, F.DIM_V, there, F.DIM_V, F.CHUNK,
                               F.BLOCK_V, True, True)  # fmt: skip
                dm = tl.load(dmass_ptr + row + t0 + tl.arange(0, F.CHUNK), mask=there, other=0.0)
                # [PAD_M, CHUNK]
                dU = mm(R, tl.trans(dn), F) + dm[None, :]
                pull += tl.sum(U * dU, 1)
                dR = mm_acc(U, dn, dR, F)
                dG = dU * held[:, None]
                dcore = mm_acc(e, tl.trans(operand(dG, F)), dcore, F)
                dreading = e * core_mm(core, dG, False, F)
                dhalf -= tl.sum(dreading, 1)
                dx = mm_acc(dreading, own_tokens(q, queries, t0, there, part, F), dx, F)
                # [CHUNK, BLOCK_D]
                dq = tl.trans(over_landmarks(own_columns(late, part, F), dreading, F))
                store_rows(dq_ptr + d0, row + t0, F.DIM, there, F.DIM - d0, dq * inputs.scale,
                           F.CHUNK, F.BLOCK_D, True, True)  # fmt: skip
        dhalf -= pull
        tl.store(dL_ptr + line * F.MARKS + offs_m, pull, mask=(offs_m < F.MARKS) & (part == 0))
        ptrs, inside = slot_rows(dR_ptr + start, 0, 0, F.DIM_V, F.BLOCK_V, F)
        tl.store(ptrs, dR, mask=inside & (part == 0))
    out = tl.cast(pair, tl.int64) * sizes.groups + group
    ptrs, inside = slot_rows(dx_ptr, out, part, F.DIM, F.BLOCK_D, F)
    tl.store(ptrs, dx * inputs.scale, mask=inside)
    ptrs, inside = slot_rows(dcore_ptr, out, 0, F.MARKS, F.PAD_M, F)
    tl.store(ptrs, dcore, mask=inside & (part == 0))
    tl.store(dhalf_ptr + out * F.MARKS + offs_m, dhalf, mask=(offs_m < F.MARKS) & (part == 0))


def forward(query, landmarks, core, L, R, scale) -> tuple[Tensor, Tensor, Tensor]:
    config = _choose("forward", query, landmarks, R)
    x = _operands(query, landmarks, core, L, R, scale, config)
    F = _features(x, config)
    numerator = L.new_empty(*query.shape[:4], F.DIM_V)
    mass, reference = L.new_empty(query.shape[:4]), L.new_empty(query.shape[:4])
    batch, heads, chunks, _ = L.shape
    parts = triton.cdiv(F.DIM_V, F.BLOCK_V)
    sizes = LaunchSizes(heads, parts, chunks, 1, chunks, query.shape[3])
    with on_device(query):
        mass_kernel[(batch * heads * chunks * parts,)](
            x, numerator, mass, reference, *sizes, F, **config.options,
        )  # fmt: skip
    return numerator, mass, reference


def backward(dnumerator, dmass, query, landmarks, core, L, R, scale) -> tuple[Tensor, ...]:
    """Everything is linear in dU, so wide values go by blocks of columns whose gradients add up."""
    config = _choose("backward", query, landmarks, R)
    parts, zero = [], torch.zeros_like(dmass)
    for v0 in range(0, R.shape[4], config.block):
        columns = slice(v0, v0 + config.block)
        dn, dm = dnumerator[..., columns], zero if v0 else dmass
        parts.append(_backward(dn, dm, query, landmarks, core, L, R[..., columns], scale, config))
    *sums, dR = zip(*parts, strict=True)
    inputs = query, landmarks, core, L
    sums = [sum(grads).to(x.dtype) for grads, x in zip(sums, inputs, strict=True)]
    return *sums, torch.cat(dR, -1)


def _backward(dnumerator, dmass, query, landmarks, core, L, R, scale, config):
    x = _operands(query, landmarks, core, L, R, scale, config)
    F = _features(x, config)
    batch, heads, chunks, marks = L.shape
    units = max(1, batch * heads * chunks // configs.PROGRAMS)
    groups = triton.cdiv(chunks, units)
    dq = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    dL, dR = torch.empty_like(x.L), torch.empty_like(x.R)
    dx, dcore = (L.new_empty(batch, heads, groups, marks, n) for n in (F.DIM, marks))
    dhalf = L.new_empty(batch, heads, groups, marks)
    sizes = LaunchSizes(heads, F.BLOCKS_D, groups, units, chunks, query.shape[3])
    with on_device(query):
        mass_backward_kernel[(batch * heads * groups * F.BLOCKS_D,)](
            x, dnumerator.contiguous(), dmass.contiguous(), dq, dL, dR, dx, dcore, dhalf,
            *sizes, F, **config.options,
        )  # fmt: skip
    half = dhalf.sum(2).unsqueeze(-1) * scale  # of scale |x|^2 / 2
    dx = dx.sum(2) + half * landmarks.to(half.dtype)
    dcore = dcore.sum(2)
    dx, dcore = (y.sum(0) if x.dim() == 3 else y for x, y in ((landmarks, dx), (core, dcore)))
    return dq, dx, dcore, dL, dR


def _choose(pass_: str, query: Tensor, landmarks: Tensor, R: Tensor) -> configs.Config:
    widths = (padded(n) for n in (landmarks.shape[-2], query.shape[4], R.shape[4]))
    return configs.choose_mass(pass_, query.device, query.dtype, *widths)


def _operands(query, landmarks, core, L, R, scale, config) -> Operands:
    half2 = landmarks.float().square().sum(-1) * (0.5 * scale * LOG2E.value)
    if query.shape[4] > config.block:  # every tile loads them again: as products take them
        landmarks = landmarks.to(query.dtype)
    return Operands(
        query=query,
        landmarks=landmarks,
        core=core,
        half2=half2,
        L=L.contiguous(),
        R=R.contiguous(),
        query_strides=query.stride()[:4],
        landmark_strides=_by_sample(landmarks),
        core_strides=_by_sample(core),
        half_batch=half2.stride(0) if half2.dim() == 3 else 0,
        scale=scale,
        scale2=scale * LOG2E.value,
    )


def _by_sample(x: Tensor) -> tuple[int, int, int]:
    """Batch, head and row stride of (H, ., .) or (B, H, ., .); 0 where samples share it."""
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])


def _features(x: Operands, config: configs.Config) -> Features:
    dim, dim_v, marks = x.query.shape[4], x.R.shape[4], x.landmarks.shape[-2]
    block_d = min(config.block, padded(dim))
    return Features(
        MARKS=marks,
        PAD_M=padded(marks),
        DIM=dim,
        BLOCK_D=block_d,
        BLOCKS_D=triton.cdiv(dim, block_d),
        DIM_V=dim_v,
        BLOCK_V=min(config.block, padded(dim_v)),
        CHUNK=min(config.tile, padded(x.query.shape[3])),
        GROUP=x.query.shape[1] // x.L.shape[1],
        BFLOAT16=x.query.dtype == torch.bfloat16,
        SPLIT=x.query.dtype == torch.bfloat16 or config.right,
        RIGHT=config.right,
        PRECISION=dot_precision(x.query.dtype),
    )
