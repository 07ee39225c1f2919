"""Running totals over the chunks of a stream, with the interface of `flashmark.hybrid.eager`.

A program walks all chunks with a few rows of the totals, so that there are many programs: rows of a
state are landmarks, those of sums are blocks of numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device
from ..nystrom.primitives import LN2, LOG2E

NUMBERS = 256  # of a program that adds plain sums
LANDMARKS = 4  # of a program that merges states


@triton.jit(do_not_specialize=["chunks", "size"])
def sums_kernel(x_ptr, out_ptr, chunks, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Running sums of x (pairs, chunks, size)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = offs < size
    line = tl.cast(tl.program_id(1), tl.int64) * chunks
    # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(chunks):
        c = chunks - 1 - n if REVERSE else n
        at = (line + c) * size + offs
        total += tl.load(x_ptr + at, mask=there, other=0.0)
        tl.store(out_ptr + at, total, mask=there)


@triton.jit
def power(x):
    """e^x for a difference of logarithms: -inf, and -inf - (-inf), give 0."""
    return tl.where(x == x, tl.exp2(tl.where(x == x, x, 0.0) * LOG2E), 0.0)


@triton.jit(do_not_specialize=["chunks", "marks", "width"])
def states_kernel(l_ptr, r_ptr, L_ptr, R_ptr, chunks, marks, width, ROWS: tl.constexpr,
                  PAD: tl.constexpr):  # fmt: skip
    """L_c = logsumexp_{d<=c} l_d, R_c = sum_{d<=c} e^{l_d - L_c} r_d."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    known = rows < marks
    inside = known[:, None] & (cols < width)[None, :]
    line = tl.cast(tl.program_id(1), tl.int64) * chunks
    # [ROWS] and [ROWS, PAD]
    L = tl.full([ROWS], float("-inf"), tl.float32)
    R = tl.zeros([ROWS, PAD], tl.float32)
    for c in range(chunks):
        at = (line + c) * marks + rows
        tile = at[:, None] * width + cols[None, :]
        own = tl.load(l_ptr + at, mask=known, other=float("-inf"))
        r = tl.load(r_ptr + tile, mask=inside, other=0.0)
        top = tl.maximum(L, own)
        pivot = tl.where(top == float("-inf"), 0.0, top)
        past, new = power(L - pivot), power(own - pivot)
        total = past + new
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        L = tl.where(total == 0.0, float("-inf"), pivot + tl.log2(total) * LN2)
        R = (past * share)[:, None] * R + (new * share)[:, None] * r
        tl.store(L_ptr + at, L, mask=known)
        tl.store(R_ptr + tile, R, mask=inside)


@triton.jit(do_not_specialize=["chunks", "marks", "width"])
def states_backward_kernel(dL_ptr, dR_ptr, l_ptr, r_ptr, L_ptr, R_ptr, dl_ptr, dr_ptr, chunks,
                           marks, width, ROWS: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    """A_c = dR_c + f A_{c+1}, b_c = dL_c + f (b_{c+1} + A_{c+1} . (R_c - R_{c+1})) with
    f = e^{L_c - L_{c+1}}; dr_c = e^{l_c - L_c} A_c, dl_c = e^{l_c - L_c} (A_c . (r_c - R_c) + b_c).
    """
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    known = rows < marks
    inside = known[:, None] & (cols < width)[None, :]
    line = tl.cast(tl.program_id(1), tl.int64) * chunks
    # [ROWS] twice and [ROWS, PAD] twice: of the chunk after
    b, later_L = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    A, later_R = tl.zeros([ROWS, PAD], tl.float32), tl.zeros([ROWS, PAD], tl.float32)
    for n in range(chunks):
        at = (line + chunks - 1 - n) * marks + rows
        tile = at[:, None] * width + cols[None, :]
        L = tl.load(L_ptr + at, mask=known, other=float("-inf"))
        R = tl.load(R_ptr + tile, mask=inside, other=0.0)
        fall = tl.where(n == 0, 0.0, power(L - later_L))
        b = tl.load(dL_ptr + at, mask=known, other=0.0) + fall * (
            b + tl.sum(A * (R - later_R), 1)
        )  # fmt: skip
        A = tl.load(dR_ptr + tile, mask=inside, other=0.0) + fall[:, None] * A
        weight = power(tl.load(l_ptr + at, mask=known, other=float("-inf")) - L)
        r = tl.load(r_ptr + tile, mask=inside, other=0.0)
        tl.store(dl_ptr + at, weight * (tl.sum(A * (r - R), 1) + b), mask=known)
        tl.store(dr_ptr + tile, weight[:, None] * A, mask=inside)
        later_L, later_R = L, R


def running_sums(x: Tensor, reverse: bool) -> Tensor:
    """As `flashmark.hybrid.eager.running_sums`."""
    x = x.contiguous()
    (batch, heads, chunks), size = x.shape[:3], x[0, 0, 0].numel()
    out = torch.empty_like(x)
    grid = triton.cdiv(size, NUMBERS), batch * heads
    with on_device(x):
        sums_kernel[grid](x, out, chunks, size, reverse, NUMBERS, num_warps=4)
    return out


def running_states(l: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741, the formula's
    """As `flashmark.hybrid.eager.running_states`."""
    l, r = l.contiguous(), r.contiguous()  # noqa: E741
    L, R = torch.empty_like(l), torch.empty_like(r)
    grid, sizes, tile = _problem(r)
    with on_device(l):
        states_kernel[grid](l, r, L, R, *sizes, *tile, num_warps=1)
    return L, R


def running_states_backward(dL, dR, l, r, L, R) -> tuple[Tensor, Tensor]:  # noqa: E741
    """As `flashmark.hybrid.eager.running_states_backward`."""
    given = [x.contiguous() for x in (dL, dR, l, r, L, R)]
    dl, dr = torch.empty_like(given[2]), torch.empty_like(given[3])
    grid, sizes, tile = _problem(r)
    with on_device(l):
        states_backward_kernel[grid](*given, dl, dr, *sizes, *tile, num_warps=1)
    return dl, dr


def _problem(r: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], tuple[int, int]]:
    """Grid, sizes and tile of states R (B, H, C, M, Dv)."""
    batch, heads, chunks, marks, width = r.shape
    grid = triton.cdiv(marks, LANDMARKS), batch * heads
    return grid, (chunks, marks, width), (LANDMARKS, triton.next_power_of_2(width))
