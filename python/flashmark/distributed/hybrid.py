"""Hybrid attention over a sequence that several processes hold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from flashmark.arguments import check_key_mask, check_qkv
from flashmark.autograd import under_autocast
from flashmark.distributed.collectives import (
    all_gather,
    check_plan,
    check_tokens,
    exchange_keys,
    process_group,
)
from flashmark.distributed.plan import ContextPlan, Exchange
from flashmark.distributed.segments import (
    Segments,
    check_exchange,
    merged,
    scanned,
    segments_of,
)
from flashmark.hybrid import far_field, hybrid_attention
from flashmark.hybrid.call import check_merge, check_window, parts_of
from flashmark.hybrid.far_field import Far
from flashmark.hybrid.state import HybridState, Totals, empty_totals
from flashmark.nystrom.checks import check_landmarks, default_core, wide_landmarks


def context_parallel_hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    window: int,
    plan: ContextPlan | None = None,
    group=None,
    merge: str = "slots",
    gate: Tensor | None = None,
    core: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    exchange: str = "all-gather",
    backend: str = "auto",
) -> Tensor:
    """`hybrid_attention` with the sequence shared out to the processes of a group.

    Every rank sends the last `window` keys and values of its tokens to the rank that goes on from
    there; one all-gather brings what landmarks keep of each rank's chunks to all ranks: M (1 + Dv)
    numbers a head, with merge="slots" M (1 + D + Dv). The backward pass sends as much back.

    Args:
        query, key, value: (B, Hq | Hkv, n, D | Dv), this rank's tokens. Without `plan` the ranks
            hold consecutive segments of the sequence. All segments but the last are a multiple of
            `window`, and not empty.
        landmarks, window, merge, core, scale, backend: as in `hybrid_attention`, the same on every
            rank.
        plan: from `balance`, where layers with another mask share out the tokens.
        group: a process group, a one-dimensional DeviceMesh, or None for all processes.
        gate: broadcastable to (B, Hq, n, 1), this rank's tokens.
        key_mask: bool (B, n), this rank's tokens.
        exchange: "all-gather"; or "scan" where every rank holds one segment, in order: log2(ranks)
            + 1 exchanges of one state, for many ranks.

    Returns:
        out (B, Hq, n, Dv) of this rank's queries.

    Gradients of landmarks, core and gate are this rank's share: their sum over the group is the
    whole.

    Raises:
        ValueError, TypeError: an argument out of range, or not this rank's part of the plan.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    check_qkv(query, key, value)
    group = process_group(group)
    if plan is not None:
        check_tokens("query", query, 2, plan, check_plan(plan, group))
    window = check_window(window)
    check_key_mask(key_mask, (key.shape[0], key.shape[2]), query.device)
    gate = check_merge(merge, gate, core, landmarks, query)
    lq, lk = wide_landmarks(*check_landmarks(landmarks, query, key), query.dtype)
    landmarks = lq if lk is lq else (lq, lk)
    width = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    if core is None and merge != "slots":
        kind = "softmax" if merge == "gate" else "kernel"
        core = default_core(lq, None if lk is lq else lk, width, kind)
    runs = parts_of("eager" if backend == "reference" else backend, merge, query, lq.shape[-2])
    far = Far(merge, lq, lk, core, width, runs[1])
    segments = segments_of(plan, group, key, bounds=True)
    bounds = segments.limits or torch.as_tensor(segments.bounds).tolist()
    _check_bounds(bounds, window)
    check_exchange(exchange, segments, dist.get_world_size(group))
    tokens = _Keys(key, value, key.new_ones(*key.shape[:3], 1))
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        tokens = _Keys(*(x.masked_fill(hidden, 0.0) for x in tokens))

    # before each segment: one window of keys, and landmark totals of all chunks before that window
    windows = _windows_before(tokens, segments, window, group)
    chunks = [last.chunks(far, window) for last in windows]
    sent = []
    for (_, place), last in zip(segments.mine, chunks, strict=True):
        whole = max(0, place.stop - place.start - 1) // window * window  # without its last chunk
        own = tokens.part(slice(place.start, place.start + whole))
        sent.append(_sum(far, torch.cat([last, own.chunks(far, window)]) if whole else last))
    blank = _packed(
        empty_totals(
            merge, (*key.shape[:2], 1, lq.shape[-2]), key.shape[3], value.shape[3],
            sent[0].dtype, key.device,
        )
    )  # fmt: skip
    sent += [blank[0]] * (segments.per_rank - len(sent))
    if exchange == "scan":
        pasts = [scanned(sent[0], blank[0], lambda a, b, _: _sum(far, torch.stack([a, b])), group)]
    else:
        ends = all_gather(torch.stack(sent), group).flatten(0, 1)[segments.order]
        ends = torch.cat([blank, ends])
        pasts = [_sum(far, ends[: number + 1]) for number, _ in segments.mine]

    outs = []
    for (number, place), past, last, chunk in zip(
        segments.mine, pasts, windows, chunks, strict=True
    ):
        state = HybridState(
            torch.full((key.shape[0],), bounds[number], dtype=torch.long, device=key.device),
            pad(last.takes_part[:, 0, :, 0] > 0, (0, window)),
            pad(last.key, (0, 0, 0, window)),
            pad(last.value, (0, 0, 0, window)),
            _unpacked(far, torch.cat([past[None], chunk, blank]), key.shape[3]),
        )
        rows = gate if gate is None or gate.shape[2] == 1 else gate[:, :, place]
        outs.append(
            hybrid_attention(
                query[:, :, place], key[:, :, place], value[:, :, place], landmarks, window=window,
                merge=merge, gate=rows, core=core, scale=scale, state=state, backend=backend,
                key_mask=None if key_mask is None else key_mask[:, place],
            )
        )  # fmt: skip
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


class _Keys(NamedTuple):
    key: Tensor  # (B, Hkv, n, D)
    value: Tensor  # (B, Hkv, n, Dv)
    takes_part: Tensor  # (B, Hkv, n, 1): 1 or 0, a column that travels with the values

    def part(self, place: slice) -> _Keys:
        return _Keys(*(x[:, :, place] for x in self))

    def chunks(self, far: Far, window: int) -> Tensor:
        """Totals of each chunk for all landmarks, packed."""
        key, value, keep = (x.unflatten(2, (-1, window)) for x in self)
        return _packed(far_field.of_chunks(far, key, value, keep[:, 0, ..., 0] > 0))


def _packed(totals: Totals) -> Tensor:
    """(chunks, B, Hkv, M, numbers) of totals of chunks."""
    first, *rest = totals
    return torch.cat([first.unsqueeze(-1), *rest], -1).movedim(2, 0)


def _unpacked(far: Far, packed: Tensor, dim: int) -> Totals:
    first, rest = packed.movedim(0, 2).split([1, packed.shape[-1] - 1], -1)
    parts = rest.tensor_split([dim], -1) if far.merge == "slots" else (rest,)
    return first.squeeze(-1), *parts


def _sum(far: Far, packed: Tensor) -> Tensor:
    """One total of many, along the first dimension."""
    return packed.sum(0) if far.merge == "slots" else merged(packed)


def _check_bounds(bounds: list[int], window: int) -> None:
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if any(n % window or n == 0 for n in lengths[:-1]):
        raise ValueError(
            f"window: expected every segment but the last to be a multiple of {window} tokens and "
            f"not empty, got segments of {lengths}"
        )


def _windows_before(tokens: _Keys, segments: Segments, window: int, group) -> list[_Keys]:
    """Keys of the window before each of this rank's segments; none take part before the first."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    holder = [place // segments.per_rank for place in segments.places]
    local = {number: place for number, place in segments.mine if holder[number] == rank}
    wanted = [number for number in local if number > 0]
    steps = torch.arange(window)

    def places(starts: list[int]) -> Tensor:
        return (torch.tensor(starts, dtype=torch.long)[:, None] + steps).flatten()

    send: list[list[int]] = [[] for _ in range(ranks)]
    receive: list[list[int]] = [[] for _ in range(ranks)]
    for number, place in local.items():
        if number + 1 < len(holder):
            send[holder[number + 1]].append(place.stop - window)
    for n, number in enumerate(wanted):
        receive[holder[number - 1]].append(n * window)
    own_index, own_place = (places(x[rank]) for x in (send, receive))
    send[rank], receive[rank] = [], []
    exchange = Exchange(
        send_index=places(sum(send, [])),
        send_counts=[len(x) * window for x in send],
        receive_place=places(sum(receive, [])),
        receive_counts=[len(x) * window for x in receive],
        own_index=own_index,
        own_place=own_place,
    ).to(tokens.key.device)
    with_column = torch.cat([tokens.value, tokens.takes_part], -1)
    key, value = exchange_keys(tokens.key, with_column, exchange, group)
    held = _Keys(key, value[..., :-1], value[..., -1:])
    # the first segment, too, takes part in the backward pass of the exchange
    nothing = _Keys(*(pad(x[:, :, :0], (0, 0, 0, window)) for x in held))
    found = [held.part(slice(n * window, (n + 1) * window)) for n in range(len(wanted))]
    return [nothing] * (len(segments.mine) - len(wanted)) + found
