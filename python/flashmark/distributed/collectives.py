"""Collectives with a gradient that is summed in a fixed order: every run gives the same bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashmark.distributed.plan import ContextPlan, Exchange

# the name since torch 2.13, and the one before
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def process_group(group) -> dist.ProcessGroup:
    """The group of a `ProcessGroup`, of a one-dimensional `DeviceMesh`, or of all processes."""
    found: Any = dist.group.WORLD if group is None else group
    return found.get_group() if hasattr(found, "get_group") else found


def check_plan(plan: ContextPlan, group: dist.ProcessGroup) -> int:
    """This process's rank in the group."""
    if not isinstance(plan, ContextPlan):
        raise TypeError(f"plan: expected a ContextPlan from balance, got {type(plan).__name__}")
    if dist.get_world_size(group) != plan.ranks:
        raise ValueError(
            f"plan: expected one for the {dist.get_world_size(group)} ranks of the group, "
            f"got one for {plan.ranks}"
        )
    return dist.get_rank(group)


def check_tokens(name: str, x: Tensor, dim: int, plan: ContextPlan, rank: int) -> None:
    expected = plan.positions(rank).numel()
    if x.shape[dim] != expected:
        raise ValueError(
            f"{name}: expected the {expected} tokens of rank {rank} in dimension {dim}, "
            f"got shape {tuple(x.shape)}"
        )


def shard(x: Tensor, plan: ContextPlan, *, group=None, dim: int = 2) -> Tensor:
    """This rank's tokens of a whole tensor, in the order in which the rank holds them."""
    rank = check_plan(plan, process_group(group))
    if x.shape[dim] != plan.length:
        raise ValueError(
            f"x: expected {plan.length} tokens in dimension {dim}, got shape {tuple(x.shape)}"
        )
    return x.index_select(dim, plan.positions(rank).to(x.device))


def unshard(x: Tensor, plan: ContextPlan, *, group=None, dim: int = 2) -> Tensor:
    """The whole tensor, on every rank, from the tokens of each; the inverse of `shard`.

    Differentiable: the gradient of a rank's tokens is summed over what the ranks did with them.
    """
    group = process_group(group)
    rank = check_plan(plan, group)
    check_tokens("x", x, dim, plan, rank)
    x = x.movedim(dim, 0)
    positions = [plan.positions(r) for r in range(plan.ranks)]
    most = max(p.numel() for p in positions)
    padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    index = torch.cat([r * most + torch.arange(p.numel()) for r, p in enumerate(positions)])
    index = index[torch.cat(positions).argsort()].to(x.device)
    return all_gather(padded, group).flatten(0, 1).index_select(0, index).movedim(0, dim)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, *x.shape), differentiable; the shape is the same on all ranks."""
    return _AllGather.apply(x, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        ranks = dist.get_world_size(group)
        out = x.new_empty(ranks, *x.shape)
        gather(out.view(ranks * x.numel()), x.contiguous().flatten(), group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        # all-to-all and a sum, not reduce-scatter: its order of summation is the transport's
        parts = torch.empty_like(dout, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, dout.contiguous(), group=ctx.group)
        return parts.sum(0), None


def shift(x: Tensor, distance: int, blank: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The `x` of the rank `distance` before; `blank` where there is none. Differentiable."""
    return _Shift.apply(x, distance, blank, group)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, distance, blank, group):
        ctx.distance, ctx.group = distance, group
        received = _from(x, -distance, group)
        return received[0] if len(received) else blank.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        received = _from(dout, ctx.distance, ctx.group)
        return received[0] if len(received) else torch.zeros_like(dout), None, None, None


def _from(x: Tensor, distance: int, group: dist.ProcessGroup) -> Tensor:
    """(1, *x.shape) of rank + distance, (0, *x.shape) where there is none."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    to = [int(r == rank - distance) for r in range(ranks)]
    came = [int(r == rank + distance) for r in range(ranks)]
    return _all_to_all(x.contiguous()[None][: sum(to)], to, came, group)


def exchange_keys(
    key: Tensor, value: Tensor, exchange: Exchange, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The keys and values that this rank's queries need, its own among them, by position."""
    return _ExchangeKeys.apply(key, value, exchange, group)


class _ExchangeKeys(torch.autograd.Function):
    """Keys and values travel in one message, tokens first: (tokens, B, Hkv, D + Dv)."""

    @staticmethod
    def forward(ctx, key, value, exchange, group):
        ctx.exchange, ctx.group = exchange, group
        ctx.widths = key.shape[3], value.shape[3]
        ctx.tokens = key.shape[2]
        send = _pack(key, value, exchange.send_index)
        received = _all_to_all(send, exchange.send_counts, exchange.receive_counts, group)
        whole = send.new_empty(exchange.gathered, *send.shape[1:])
        whole[exchange.own_place] = _pack(key, value, exchange.own_index)
        whole[exchange.receive_place] = received
        return whole.permute(1, 2, 0, 3).split(ctx.widths, dim=3)

    @staticmethod
    @once_differentiable
    def backward(ctx, dkey, dvalue):
        exchange = ctx.exchange
        send = _pack(dkey, dvalue, exchange.receive_place)
        received = _all_to_all(send, exchange.receive_counts, exchange.send_counts, ctx.group)
        dtype = torch.promote_types(send.dtype, torch.float32)
        total = send.new_zeros(ctx.tokens, *send.shape[1:], dtype=dtype)
        total[exchange.own_index] = _pack(dkey, dvalue, exchange.own_place).to(dtype)
        parts = zip(
            exchange.send_index.split(exchange.send_counts),
            received.split(exchange.send_counts),
            strict=True,
        )
        for index, part in parts:  # no token twice in one part
            if index.numel():
                total.index_add_(0, index, part.to(dtype))
        grads = total.to(send.dtype).permute(1, 2, 0, 3).split(ctx.widths, dim=3)
        return *grads, None, None


def _pack(key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    packed = [x.permute(2, 0, 1, 3).index_select(0, index) for x in (key, value)]
    return torch.cat(packed, dim=3)


def _all_to_all(
    send: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = send.new_empty(sum(receive_counts), *send.shape[1:])
    dist.all_to_all_single(received, send, receive_counts, send_counts, group=group)
    return received
