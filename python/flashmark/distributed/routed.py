"""Routed attention over a sequence that several processes hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from flashmark.arguments import check_count
from flashmark.autograd import under_autocast, without_autocast
from flashmark.distributed.collectives import exchange_keys, gather, process_group
from flashmark.distributed.plan import Exchange
from flashmark.routed.attention import run
from flashmark.routed.checks import check_call, check_landmarks
from flashmark.routed.choice import Choice, choose_by
from flashmark.routed.summaries import RoutedState, summarize


def context_parallel_routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None = None,
    *,
    group=None,
    block_size: int = 64,
    top_k: int = 16,
    near: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """`routed_attention` with the sequence shared out to the processes of a group.

    One all-gather brings the summaries of all blocks to every rank, which chooses for its own
    queries. Keys and values of a block then go only to the ranks that have a query which reads it,
    all to all. The backward pass returns their gradients the same way; the owners sum them in order
    of rank.

    Args:
        query, key, value: (B, Hq | Hkv, n, D | Dv), this rank's tokens. The ranks hold consecutive
            segments of the sequence; all but the last are a multiple of `block_size`.
        landmarks, block_size, top_k, near, scale, softcap, sinks, deterministic, backend: as in
            `routed_attention`, the same on every rank.
        group: a process group, a one-dimensional DeviceMesh, or None for all processes.
        key_mask: bool (B, n), this rank's tokens.

    Returns:
        out (B, Hq, n, Dv) of this rank's queries.

    The sizes of the messages depend on the choice: a GPU waits for it once. Gradients of `sinks`
    are this rank's share: their sum over the group is the whole.

    Raises:
        ValueError, TypeError: an argument out of range.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    checked = check_call(
        query, key, value, block_size, near, scale, softcap, sinks, None, None, key_mask, None,
        "eager" if backend == "reference" else backend,
    )  # fmt: skip
    check_count("top_k", top_k, 0)
    check_landmarks(landmarks, query, key)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"key: expected length {query.shape[2]} like query, got {key.shape[2]}")
    group = process_group(group)
    rank = dist.get_rank(group)
    lengths = _gathered(key.new_tensor([key.shape[2]], dtype=torch.int64), group).tolist()
    if any(length % block_size for length in lengths[:-1]):
        raise ValueError(
            f"block_size: expected every segment but the last to be a multiple of {block_size} "
            f"tokens, got segments of {lengths}"
        )
    counts = [-(-length // block_size) for length in lengths]
    with torch.no_grad(), without_autocast(query.device.type):
        own = summarize(
            key, landmarks, checked.scale, checked.keep, checked.blocks(key, block_size)
        )
        state = RoutedState(*(_all_blocks(x, counts, group) for x in own))
        start = torch.full((1,), sum(lengths[:rank]), dtype=torch.int32, device=query.device)
        call = Choice(
            query,
            *state,
            int(top_k),
            int(block_size),
            int(near),
            checked.scale,
            sum(lengths),
            start,
        )
        indices = choose_by(call, checked.backend)
        needed = _needed(indices, counts, rank, near)
        exchange = _exchange(_gathered(needed, group).view(len(counts), -1).cpu(), lengths, counts,
                             block_size, rank)  # fmt: skip
        numbers = pad(needed.cumsum(0) - 1, (0, 1), value=-1)  # the last entry: no block
        indices = numbers[indices.long()].to(torch.int32)
    if key_mask is not None:  # travels as a column of the values
        value = torch.cat([value, key_mask[:, None, :, None].expand(*value.shape[:3], 1)], -1)
    key, value = exchange_keys(key, value, exchange.to(key.device), group)
    if key_mask is not None:
        value, column = value.split([value.shape[3] - 1, 1], -1)
        key_mask = column[:, 0, :, 0] > 0
    return run(query, key, value, indices, block_size, near, sinks, key_mask, checked,
               deterministic)[0]  # fmt: skip


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks * n,) of (n,)."""
    out = x.new_empty(dist.get_world_size(group) * x.numel())
    gather(out, x.contiguous(), group)
    return out


def _all_blocks(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Summaries of all ranks' blocks, in order, along dimension 2."""
    most = max(counts)
    x = x.movedim(2, 0)
    x = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    parts = _gathered(x.flatten(), group).view(len(counts), *x.shape)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).movedim(0, 2)


def _needed(indices: Tensor, counts: list[int], rank: int, near: int) -> Tensor:
    """bool (blocks,): a query of this rank reads the block; its own blocks always."""
    blocks, first = sum(counts), sum(counts[:rank])
    needed = torch.zeros(blocks + 1, dtype=torch.bool, device=indices.device)
    needed[indices.flatten().long()] = True  # -1 is the last entry
    needed[max(0, first - near) : first + counts[rank]] = True
    return needed[:blocks]


def _exchange(
    needed: Tensor, lengths: list[int], counts: list[int], block_size: int, rank: int
) -> Exchange:
    """Messages of this rank, from who needs what, bool (ranks, blocks)."""
    ranks = len(counts)
    owner = torch.arange(ranks).repeat_interleave(torch.tensor(counts))
    first = sum(lengths[:rank])
    step = torch.arange(block_size)

    def tokens(blocks: Tensor) -> Tensor:
        found = (blocks[:, None] * block_size + step).flatten()
        return found[found < sum(lengths)]

    mine = owner == rank
    place = tokens(needed[rank].nonzero().flatten())
    send = [tokens((needed[r] & mine).nonzero().flatten()) - first for r in range(ranks)]
    receive = [tokens((needed[rank] & (owner == r)).nonzero().flatten()) for r in range(ranks)]
    own = receive[rank]
    send[rank], receive[rank] = own[:0], own[:0]
    return Exchange(
        send_index=torch.cat(send),
        send_counts=[len(x) for x in send],
        receive_place=torch.searchsorted(place, torch.cat(receive)),
        receive_counts=[len(x) for x in receive],
        own_index=own - first,
        own_place=torch.searchsorted(place, own),
    )
