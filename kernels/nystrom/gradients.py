"""Parts that the backward launchers share: reverse states, their scan, and parameter gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device
from . import arguments as args
from . import configs
from .arguments import Problem
from .primitives import locate


class Reverse(NamedTuple):
    """Reverse states, a line a stretch: what it adds by itself, then the state at its end.

    Those of slots, a line a slot, are what the rest of its stretch adds by itself.
    """

    pull: Tensor  # (lines, SLICES, PAD_M)
    G: Tensor  # (lines, PAD_M, PAD_V)
    ratio: Tensor  # (lines, PAD_M): e^{L at the start - L at the end}, of a slot's end in a stretch
    slots: Reverse | None = None


class RowPartials(NamedTuple):
    """Shares of the parameter gradients, a line a program."""

    dcore: Tensor  # (pairs, SLICES, groups, PAD_M, PAD_M)
    dlk: Tensor  # (pairs, SLICES, groups, PAD_M, PAD_D)
    dhalf: Tensor  # (pairs, SLICES, groups, PAD_M)
    ddecay: Tensor  # (pairs, SLICES, groups, PAD_M)


class KeyPartials(NamedTuple):
    dlq: Tensor
    ddecay: Tensor


@triton.jit
def load_added(own, line, r0, piece, there, ROWS: tl.constexpr, F: tl.constexpr):
    """(pull, ratio, G) of ROWS landmarks of a line from r0 on; of no use unless `there`."""
    rows = r0 + tl.arange(0, ROWS)
    at = line * F.PAD_M + rows
    on = there & (at >= 0)
    pull = tl.load(pull_ptrs(own.pull, line, piece, rows, F), mask=on, other=0.0)
    ratio = tl.load(own.ratio + at, mask=on, other=0.0)
    # [ROWS, BLOCK_V]
    return pull, ratio, tl.load(slice_ptrs(own.G, at, piece, F), mask=on[:, None], other=0.0)


@triton.jit
def pull_ptrs(base, line, piece, rows, F: tl.constexpr):
    return base + (line * F.SLICES + piece) * F.PAD_M + rows


@triton.jit
def slice_ptrs(base, at, piece, F: tl.constexpr):
    """Pointers to a slice of columns of rows `at` of (., PAD_V)."""
    return base + at[:, None] * F.PAD_V + (piece * F.BLOCK_V + tl.arange(0, F.BLOCK_V))[None, :]


@triton.jit(do_not_specialize=Problem._fields)
def reverse_scan_kernel(own, pull_ptr, G_ptr, sequences, heads, parts, groups, stretches, units,
                        span, tokens, ROWS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Replace what each stretch adds by the reverse state at its end; (pull_ptr, G_ptr) goes from
    the reverse state after the last token to that before the first.

    A program has ROWS landmarks of a slice of columns; loads run three stretches ahead.
    """
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    block, row, h = locate(problem)
    b = row
    first, count = 0, problem.stretches
    if F.PACKED:
        b = 0
        first = tl.load(sequences + 2 * row)
        count = tl.load(sequences + 2 * row + 1)
    r0, piece = block // F.SLICES * ROWS, block % F.SLICES
    # [ROWS]
    rows = r0 + tl.arange(0, ROWS)
    last = (tl.cast(b, tl.int64) * problem.heads + h) * problem.stretches + first + count - 1
    end = tl.cast(row, tl.int64) * problem.heads + h
    pulls = pull_ptrs(pull_ptr, end, piece, rows, F)
    Gs = slice_ptrs(G_ptr, end * F.PAD_M + rows, piece, F)
    # [ROWS, BLOCK_V]
    G = tl.load(Gs)
    pull = tl.load(pulls)
    one = load_added(own, last, r0, piece, count > 0, ROWS, F)
    two = load_added(own, last - 1, r0, piece, count > 1, ROWS, F)
    three = load_added(own, last - 2, r0, piece, count > 2, ROWS, F)
    for n in range(count):
        four = load_added(own, last - n - 3, r0, piece, n + 3 < count, ROWS, F)
        own_pull, ratio, own_G = one
        tl.debug_barrier()  # several threads read an element that one of them overwrites
        tl.store(pull_ptrs(own.pull, last - n, piece, rows, F), pull)
        tl.store(slice_ptrs(own.G, (last - n) * F.PAD_M + rows, piece, F), G)
        pull = pull * ratio + own_pull
        G = G * ratio[:, None] + own_G
        one, two, three = two, three, four
    tl.debug_barrier()
    tl.store(pulls, pull)
    tl.store(Gs, G)


def outgoing(call: args.Inputs, ends: args.Ends, dL, dR, F) -> tuple[Tensor, Tensor]:
    """The reverse state (pull, G) after the last token, from the gradients of L and R there."""
    lines, marks = ends.L.shape[0] * ends.L.shape[1], slice(F.MARKS)
    pull = ends.L.new_zeros(lines, F.SLICES, F.PAD_M)
    G = ends.L.new_zeros(lines, F.PAD_M, F.PAD_V)
    if dR is not None:
        dR = dR.float()
        G[:, marks, : F.DIM_V] = dR.flatten(0, 1)
        products = torch.nn.functional.pad(dR * ends.R, (0, F.PAD_V - F.DIM_V))
        pull[..., marks] = products.reshape(lines, F.MARKS, F.SLICES, -1).sum(-1).mT
    if dL is not None:
        pull[:, 0, marks] -= dL.float().flatten(0, 1)
    return pull, G


def reverse_scan(
    call: args.Inputs, reverse: Reverse, pull: Tensor, G: Tensor, stretches: args.Stretches,
    problem: args.Problem, F: args.Features,
) -> None:  # fmt: skip
    """In place: stretches to the reverse states at their ends, (pull, G) to that before all."""
    blocks = F.PAD_M // configs.SCAN_ROWS * F.SLICES
    problem = problem._replace(parts=blocks, groups=call.rows)
    with on_device(call.query):
        reverse_scan_kernel[(call.rows * problem.heads * blocks,)](
            reverse, pull, G, stretches.sequences, *problem, configs.SCAN_ROWS, F, num_warps=1
        )


def new_reverse(like: Tensor, lines: int, F: args.Features, dtype=torch.float32) -> Reverse:
    pull = torch.empty(lines, F.SLICES, F.PAD_M, dtype=torch.float32, device=like.device)
    G = torch.empty(lines, F.PAD_M, F.PAD_V, dtype=dtype, device=like.device)
    return Reverse(pull, G, pull.new_empty(lines, F.PAD_M))


def new_row_partials(like: Tensor, pairs: int, groups: int, F: args.Features) -> RowPartials:
    lines = pairs, F.SLICES, groups, F.PAD_M
    vectors = torch.empty(2, *lines, dtype=torch.float32, device=like.device)
    dcore = vectors.new_empty(*lines, F.PAD_M)
    return RowPartials(dcore, vectors.new_empty(*lines, F.BLOCKS_D * F.BLOCK_D), *vectors)


def new_key_partials(like: Tensor, pairs: int, groups: int, F: args.Features) -> KeyPartials:
    lines = pairs, F.SLICES, groups, F.PAD_M
    ddecay = torch.empty(*lines, dtype=torch.float32, device=like.device)
    return KeyPartials(ddecay.new_empty(*lines, F.BLOCKS_D * F.BLOCK_D), ddecay)


def parameter_gradients(
    call: args.Inputs, rows: RowPartials, keys: KeyPartials, F: args.Features
) -> dict[str, Tensor]:
    """Shares added up in a fixed order: every run gives the same bits."""
    batch, heads = call.key.shape[:2]

    def total(x: Tensor) -> Tensor:
        return x.flatten(1, 2).sum(1).view(batch, heads, *x.shape[3:])

    marks, dim = slice(F.MARKS), slice(F.DIM)
    grads = {
        "lq": total(keys.dlq)[..., marks, dim] * call.marks.scale,
        "lk": total(rows.dlk)[..., marks, dim] * call.marks.scale,
        "core": total(rows.dcore)[..., marks, marks],
        "decay": (total(rows.ddecay) + total(keys.ddecay))[..., marks].sum(0),
    }
    return grads | ({"half": total(rows.dhalf)[..., marks]} if call.mass else {})
