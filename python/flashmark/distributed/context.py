"""Block-sparse attention over a sequence that several processes hold."""

from __future__ import annotations

from torch import Tensor

from flashmark.arguments import check_qkv
from flashmark.autograd import under_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.distributed.collectives import (
    check_plan,
    check_tokens,
    exchange_keys,
    process_group,
)
from flashmark.distributed.plan import ContextPlan


def context_parallel_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ContextPlan,
    *,
    group=None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` with the sequence shared out to the processes of a group.

    Keys and values are exchanged once, all to all: a key tile goes only to the ranks that have a
    query which sees it. Every rank then computes its own queries in one call. The backward pass
    returns the gradients of keys and values the same way; their owners sum them in order of rank.

    Args:
        query: (B, Hq, n, D), this rank's tokens: n = `plan.positions(rank).numel()`, in that order.
        key: (B, Hkv, n, D).
        value: (B, Hkv, n, Dv).
        plan: from `balance`, the same on every rank. Its mask has 1 or B samples, 1 or Hq heads.
        group: a process group, a one-dimensional DeviceMesh, or None for all processes.
        bias: (Hq, 2 N - 1), relative, as in `block_sparse_attention` for the whole length N.
            Here it is written out for the rank's queries and keys, in memory Hq x n x keys.
        scale, softcap, sinks, return_lse, deterministic, backend: as in `block_sparse_attention`.

    Returns:
        out (B, Hq, n, Dv), with `return_lse` also lse (B, Hq, n), of this rank's queries.

    Gradients of `bias` and `sinks` are this rank's share: their sum over the group is the whole,
    as for every parameter of a model whose tokens are shared out.

    Raises:
        ValueError, TypeError: an argument out of range, or not this rank's part of the plan.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    check_qkv(query, key, value)
    group = process_group(group)
    rank = check_plan(plan, group)
    for name, x in (("query", query), ("key", key)):
        check_tokens(name, x, 2, plan, rank)
    if bias is not None:
        bias = _written_out(bias, plan, rank, query)
    exchange = plan.exchange(rank, query.device)
    key, value = exchange_keys(key, value, exchange, group)
    mask = plan.local_mask(rank, query.device)
    return block_sparse_attention(
        query, key, value, mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks,
        return_lse=return_lse, deterministic=deterministic, backend=backend,
    )  # fmt: skip


def _written_out(bias: Tensor, plan: ContextPlan, rank: int, query: Tensor) -> Tensor:
    """Relative bias -> (1, Hq, queries, gathered keys)."""
    expected = query.shape[1], 2 * plan.length - 1
    if not isinstance(bias, Tensor) or tuple(bias.shape) != expected:
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias: expected a relative one of shape {expected}, got {got}")
    distance = plan.gathered_positions(rank) - plan.positions(rank)[:, None] + plan.length - 1
    return bias[:, distance.to(bias.device)].unsqueeze(0)
