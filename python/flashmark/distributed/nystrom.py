"""Nyström attention over a sequence that several processes hold."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashmark.arguments import check_qkv
from flashmark.autograd import under_autocast
from flashmark.distributed.collectives import (
    all_gather,
    check_plan,
    check_tokens,
    process_group,
)
from flashmark.distributed.plan import ContextPlan
from flashmark.distributed.segments import Segments, check_exchange, merged, scanned, segments_of
from flashmark.nystrom import NystromState, nystrom_attention
from flashmark.nystrom.checks import check_landmarks, default_core, wide_landmarks


def context_parallel_nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    plan: ContextPlan | None = None,
    group=None,
    core: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "landmark",
    decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    state: NystromState | None = None,
    return_state: bool = False,
    exchange: str = "all-gather",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, NystromState]:
    """Causal `nystrom_attention` with the sequence shared out to the processes of a group.

    Every rank computes the state that its own tokens leave, M (Dv + 1) numbers a head; one
    all-gather brings all of them to all ranks; every rank merges those before its tokens and runs
    from there. The backward pass sends as many gradients of states back. The pass that yields only
    the state reads no queries. With `decay` it is a causal pass like the second, twice the work.

    An all-gather brings a rank as many states as there are ranks. exchange="scan" brings it
    log2(ranks) + 1, one after the other: for many ranks.

    Args:
        query, key, value: (B, Hq | Hkv, n, D | Dv), this rank's tokens. Without `plan` the ranks
            hold consecutive segments of the sequence, of any lengths.
        landmarks, core, scale, normalize, decay, backend: as in `nystrom_attention`, the same on
            every rank.
        plan: from `balance`, where layers with another mask share out the tokens. Every segment of
            the sequence that a rank holds sends a state.
        group: a process group, a one-dimensional DeviceMesh, or None for all processes.
        key_mask: bool (B, n), this rank's tokens.
        state: what the tokens before the whole sequence left, the same on every rank.
        return_state: also return the state after the whole sequence, the same on every rank. Not
            with exchange="scan".
        exchange: "all-gather", or "scan" where every rank holds one segment, in order.

    Returns:
        out (B, Hq, n, Dv) of this rank's queries; with `return_state` also a NystromState.

    Gradients of landmarks, core, decay and `state` are this rank's share: their sum over the group
    is the whole. A loss that reads the returned state should do so on one rank.

    Raises:
        ValueError, TypeError: an argument out of range, or not this rank's part of the plan.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    check_qkv(query, key, value)
    group = process_group(group)
    if plan is not None:
        check_tokens("query", query, 2, plan, check_plan(plan, group))
    segments = segments_of(plan, group, key, bounds=decay is not None)
    check_exchange(exchange, segments, dist.get_world_size(group))
    if exchange == "scan" and return_state:
        raise ValueError("return_state: expected False with exchange='scan', got True")
    tied = isinstance(landmarks, Tensor)
    lq, lk = wide_landmarks(*check_landmarks(landmarks, query, key), query.dtype)
    landmarks = lq if tied else (lq, lk)
    if core is None:
        kind = "kernel" if normalize == "mass" else "softmax"
        width = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
        core = default_core(lq, None if tied else lk, width, kind)

    def run(queries: Tensor, place: slice, **options) -> Any:
        mask = None if key_mask is None else key_mask[:, place]
        return nystrom_attention(
            queries[:, :, place], key[:, :, place], value[:, :, place], landmarks, scale=scale,
            normalize=normalize, key_mask=mask, backend=backend, **options,
        )  # fmt: skip

    if decay is None and backend != "reference":
        readers, state_pass = query[:, :, :0], {"is_causal": False}
    else:
        readers, state_pass = query.detach(), {"decay": decay}
    state_pass |= {"core": core.detach(), "return_state": True}
    own = [_packed(run(readers, place, **state_pass)[1]) for _, place in segments.mine]
    nothing = torch.zeros_like(own[0])
    nothing[..., 0] = -math.inf
    first = nothing if state is None else _packed(state).to(own[0].dtype)
    if exchange == "scan":
        before = [_by_scan(own[0], first, nothing, segments, group, decay)]
    else:
        own += [nothing] * (segments.per_rank - len(own))
        ends = all_gather(torch.stack(own), group).flatten(0, 1)[segments.order]
        # the first segment's state is in `ends` too: its rank takes part in the backward pass
        ends = torch.cat([first[None], ends])
        before = [_joined(ends, segments, number, decay) for number, _ in segments.mine]
    outs = [
        run(query, place, core=core, decay=decay, state=NystromState(held[..., 0], held[..., 1:]))
        for (_, place), held in zip(segments.mine, before, strict=True)
    ]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    if not return_state:
        return out
    after = _joined(ends, segments, len(ends) - 1, decay)
    return out, NystromState(after[..., 0], after[..., 1:])


def _packed(state: NystromState) -> Tensor:
    """(B, Hkv, M, 1 + Dv)"""
    return torch.cat([state[0].unsqueeze(-1), state[1]], -1)


def _joined(ends: Tensor, segments: Segments, number: int, decay: Tensor | None) -> Tensor:
    """The state before segment `number`, packed, from the states after each segment."""
    ends = ends[: number + 1]
    if decay is None or segments.bounds is None:
        return merged(ends)
    return merged(_aged(ends, segments.bounds[number] - segments.bounds[: number + 1], decay))


def _by_scan(
    own: Tensor, first: Tensor, nothing: Tensor, segments: Segments, group, decay: Tensor | None
) -> Tensor:
    """The state before this rank's segment, packed."""
    rank, bounds = dist.get_rank(group), segments.bounds

    def combine(left: Tensor, right: Tensor, width: int) -> Tensor:
        both = torch.stack([left, right])
        if decay is None or bounds is None:
            return merged(both)
        return merged(_aged(both, bounds[rank] - bounds[[max(0, rank - width), rank]], decay))

    return combine(first, scanned(own, nothing, combine, group), rank)


def _aged(ends: Tensor, tokens: Tensor, decay: Tensor) -> Tensor:
    """States after more tokens without new keys: L falls by the decay."""
    fall = decay.to(ends.dtype) * tokens.view(-1, 1, 1, 1)
    return torch.cat([ends[..., :1] - fall.unsqueeze(-1), ends[..., 1:]], -1)
