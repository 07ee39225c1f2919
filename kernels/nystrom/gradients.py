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
    """Reverse states, a line a stretch: what it adds by itself, then the state at its end."""

    pull: Tensor  # (lines, PAD_M)
    G: Tensor  # (lines, PAD_M, PAD_V)
    ratio: Tensor  # (lines, PAD_M): e^{L at the stretch's start - L at its end}


class RowPartials(NamedTuple):
    """Shares of the parameter gradients, a line a program."""

    dcore: Tensor  # (pairs, groups, PAD_M, PAD_M)
    dlk: Tensor  # (pairs, groups, PAD_M, PAD_D)
    dhalf: Tensor  # (pairs, groups, PAD_M)
    ddecay: Tensor  # (pairs, groups, PAD_M)


class KeyPartials(NamedTuple):
    dlq: Tensor
    ddecay: Tensor


@triton.jit
def load_added(own, line, r0, there, ROWS: tl.constexpr, F: tl.constexpr):
    """(pull, ratio, G) of ROWS landmarks of a line from r0 on; of no use unless `there`."""
    at = line * F.PAD_M + r0 + tl.arange(0, ROWS)
    on = there & (at >= 0)
    pull = tl.load(own.pull + at, mask=on, other=0.0)
    ratio = tl.load(own.ratio + at, mask=on, other=0.0)
    ptrs = own.G + at[:, None] * F.PAD_V + tl.arange(0, F.PAD_V)[None, :]
    # [ROWS, PAD_V]
    return pull, ratio, tl.load(ptrs, mask=on[:, None], other=0.0)


@triton.jit(do_not_specialize=Problem._fields)
def reverse_scan_kernel(own, pull_ptr, G_ptr, sequences, heads, parts, groups, stretches, units,
                        span, tokens, ROWS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Replace what each stretch adds by the reverse state at its end; (pull_ptr, G_ptr) goes from
    the reverse state after the last token to that before the first.

    A program has ROWS landmarks; loads run three stretches ahead.
    """
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    block, row, h = locate(problem)
    b = row
    first, count = 0, problem.stretches
    if F.PACKED:
        b = 0
        first = tl.load(sequences + 2 * row)
        count = tl.load(sequences + 2 * row + 1)
    r0 = block * ROWS
    # [ROWS]
    rows = r0 + tl.arange(0, ROWS)
    cols = tl.arange(0, F.PAD_V)
    last = (tl.cast(b, tl.int64) * problem.heads + h) * problem.stretches + first + count - 1
    end = (tl.cast(row, tl.int64) * problem.heads + h) * F.PAD_M + rows
    # [ROWS, PAD_V]
    G = tl.load(G_ptr + end[:, None] * F.PAD_V + cols[None, :])
    pull = tl.load(pull_ptr + end)
    one = load_added(own, last, r0, count > 0, ROWS, F)
    two = load_added(own, last - 1, r0, count > 1, ROWS, F)
    three = load_added(own, last - 2, r0, count > 2, ROWS, F)
    for n in range(count):
        four = load_added(own, last - n - 3, r0, n + 3 < count, ROWS, F)
        own_pull, ratio, own_G = one
        tl.debug_barrier()  # several threads read an element that one of them overwrites
        at = (last - n) * F.PAD_M + rows
        tl.store(own.pull + at, pull)
        tl.store(own.G + at[:, None] * F.PAD_V + cols[None, :], G)
        pull = pull * ratio + own_pull
        G = G * ratio[:, None] + own_G
        one, two, three = two, three, four
    tl.debug_barrier()
    tl.store(pull_ptr + end, pull)
    tl.store(G_ptr + end[:, None] * F.PAD_V + cols[None, :], G)


def outgoing(call: args.Inputs, ends: args.Ends, dL, dR, F) -> tuple[Tensor, Tensor]:
    """The reverse state (pull, G) after the last token, from the gradients of L and R there."""
    lines, marks = ends.L.shape[0] * ends.L.shape[1], slice(F.MARKS)
    pull, G = ends.L.new_zeros(lines, F.PAD_M), ends.L.new_zeros(lines, F.PAD_M, F.PAD_V)
    if dR is not None:
        dR = dR.float()
        G[:, marks, : F.DIM_V] = dR.flatten(0, 1)
        pull[:, marks] = (dR * ends.R).sum(-1).flatten(0, 1)
    if dL is not None:
        pull[:, marks] -= dL.float().flatten(0, 1)
    return pull, G


def reverse_scan(
    call: args.Inputs, reverse: Reverse, pull: Tensor, G: Tensor, stretches: args.Stretches,
    problem: args.Problem, F: args.Features,
) -> None:  # fmt: skip
    """In place: stretches to the reverse states at their ends, (pull, G) to that before all."""
    blocks = F.PAD_M // configs.SCAN_ROWS
    problem = problem._replace(parts=blocks, groups=call.rows)
    with on_device(call.query):
        reverse_scan_kernel[(call.rows * problem.heads * blocks,)](
            reverse, pull, G, stretches.sequences, *problem, configs.SCAN_ROWS, F, num_warps=1
        )


def new_reverse(like: Tensor, lines: int, F: args.Features) -> Reverse:
    vectors = torch.empty(2, lines, F.PAD_M, dtype=torch.float32, device=like.device)
    return Reverse(vectors[0], vectors.new_empty(lines, F.PAD_M, F.PAD_V), vectors[1])


def new_row_partials(like: Tensor, pairs: int, groups: int, F: args.Features) -> RowPartials:
    vectors = torch.empty(2, pairs, groups, F.PAD_M, dtype=torch.float32, device=like.device)
    dcore = vectors.new_empty(pairs, groups, F.PAD_M, F.PAD_M)
    dlk = vectors.new_empty(pairs, groups, F.PAD_M, F.BLOCKS_D * F.BLOCK_D)
    return RowPartials(dcore, dlk, vectors[0], vectors[1])


def new_key_partials(like: Tensor, pairs: int, groups: int, F: args.Features) -> KeyPartials:
    ddecay = torch.empty(pairs, groups, F.PAD_M, dtype=torch.float32, device=like.device)
    return KeyPartials(ddecay.new_empty(pairs, groups, F.PAD_M, F.BLOCKS_D * F.BLOCK_D), ddecay)


def parameter_gradients(
    call: args.Inputs, rows: RowPartials, keys: KeyPartials, F: args.Features
) -> dict[str, Tensor]:
    """Shares added up in a fixed order: every run gives the same bits."""
    batch, heads = call.key.shape[:2]

    def total(x: Tensor) -> Tensor:
        return x.sum(1).view(batch, heads, *x.shape[2:])

    marks, dim = slice(F.MARKS), slice(F.DIM)
    grads = {
        "lq": total(keys.dlq)[..., marks, dim] * call.marks.scale,
        "lk": total(rows.dlk)[..., marks, dim] * call.marks.scale,
        "core": total(rows.dcore)[..., marks, marks],
        "decay": (total(rows.ddecay) + total(keys.ddecay))[..., marks].sum(0),
    }
    return grads | ({"half": total(rows.dhalf)[..., marks]} if call.mass else {})
