"""The consecutive segments of a sequence that the ranks hold, and how their states merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashmark.distributed.collectives import gather, shift
from flashmark.distributed.plan import ContextPlan


class Segments(NamedTuple):
    """The segments of the sequence in order: each lies on one rank."""

    mine: list[tuple[int, slice]]  # this rank's: number in the sequence, and local tokens
    per_rank: int  # most segments that a rank has
    places: list[int]  # of each segment: rank * per_rank + its number on the rank
    order: Tensor  # `places` on the device
    bounds: Tensor | None  # start of each, and the total length; None where not asked for
    limits: list[int] | None = None  # `bounds` on the host, where a plan knows them


def segments_of(
    plan: ContextPlan | None, group: dist.ProcessGroup, key: Tensor, *, bounds: bool
) -> Segments:
    """Segments of a plan, cached; without a plan, the ranks' tokens follow each other."""
    rank, ranks, device = dist.get_rank(group), dist.get_world_size(group), key.device
    if plan is not None:
        return plan.remember("segments", rank, device, lambda: _of_plan(plan, rank, device))
    ends = None
    if bounds:
        lengths = torch.empty(ranks, dtype=torch.long, device=device)
        gather(lengths, lengths.new_full((1,), key.shape[2]), group)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    order = torch.arange(ranks, device=device)
    return Segments([(rank, slice(0, key.shape[2]))], 1, list(range(ranks)), order, ends)


def _of_plan(plan: ContextPlan, rank: int, device: torch.device) -> Segments:
    held = [plan.segments(r) for r in range(plan.ranks)]
    per_rank = max(1, *map(len, held))
    known = sorted(
        (start, stop, r, number)
        for r, ranges in enumerate(held)
        for number, (start, stop) in enumerate(ranges)
    )
    mine, first = [], 0
    for number, (start, stop, r, _) in enumerate(known):
        if r == rank:
            mine.append((number, slice(first, first + stop - start)))
            first += stop - start
    mine = mine or [(0, slice(0, 0))]  # a rank without tokens takes part in the collectives
    places = [r * per_rank + number for *_, r, number in known]
    limits = [0, *(stop for _, stop, *_ in known)]
    tensors = (torch.tensor(x, dtype=torch.long, device=device) for x in (places, limits))
    return Segments(mine, per_rank, places, *tensors, limits)


EXCHANGES = ("all-gather", "scan")


def check_exchange(exchange: str, segments: Segments, ranks: int) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected 'all-gather' or 'scan', got {exchange!r}")
    if exchange == "scan" and (segments.per_rank, segments.places) != (1, list(range(ranks))):
        raise ValueError(
            "exchange: expected 'all-gather' where a rank holds no segment or several, got 'scan'"
        )


def scanned(
    own: Tensor, blank: Tensor, combine: Callable[[Tensor, Tensor, int], Tensor], group
) -> Tensor:
    """Combined state of all ranks before this one, after log2(ranks) + 1 exchanges of one state.

    `combine(left, right, width)`: right is of the `width` ranks before this one (or all there are),
    left of those before them. Source: Hillis and Steele, "Data parallel algorithms" (1986).
    """
    held, width = shift(own, 1, blank, group), 1
    while width < dist.get_world_size(group):
        held = combine(shift(held, width, blank, group), held, width)
        width *= 2
    return held


def merged(packed: Tensor) -> Tensor:
    """One Nyström state of many, along the first dimension; packed: (L, R) side by side.

    L = logsumexp_s L_s, R = sum_s exp(L_s - L) R_s; L = -inf where nothing is held.
    """
    L, R = packed[..., :1], packed[..., 1:]
    empty = (L == -math.inf).all(0)
    total = L.masked_fill(empty, 0.0).logsumexp(0)
    share = torch.exp(L - total).masked_fill(empty, 0.0)
    return torch.cat([total.masked_fill(empty, -math.inf), (share * R).sum(0)], -1)
