"""The definition of routed attention, densely: scores, choice of blocks, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def block_topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    block_size: int = 64,
    near: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over chosen and near blocks, as `flashmark.block_topk_attention`."""
    (batch, heads, q_len, dim), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    at, first = _places(q_len, kv_len, query_offset, cu_seqlens, query.device)  # (B|1, Nq)
    starts = _starts(kv_len, cu_seqlens, query.device)
    token = torch.arange(kv_len, device=query.device)
    own = (at - first).div(block_size, rounding_mode="floor")[..., None]  # (B|1, Nq, 1)
    block = (token - starts) // block_size  # (Nk,)
    same = (first[..., None] == starts) & (at[..., None] >= token)  # (B|1, Nq, Nk)
    close = same & (block >= own - near)
    allowed = (indices >= 0) & (indices < own[:, None] - near)  # (B, Hkv, Nq, K)
    chosen = torch.zeros(batch, kv_heads, q_len, kv_len, dtype=torch.bool, device=query.device)
    for n in range(indices.shape[3]):
        chosen = chosen | ((indices[..., n, None] == block) & allowed[..., n, None])
    visible = close[:, None] | (chosen & same[:, None])
    if kv_lengths is not None:
        inside = token < kv_lengths.view(-1, 1)
        key, value = (x.masked_fill(~inside[:, None, :, None], 0.0) for x in (key, value))
        visible = visible & inside[:, None, None]
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = (x.masked_fill(hidden, 0.0) for x in (key, value))
        visible = visible & key_mask[:, None, None]
    group = heads // kv_heads
    key, value, visible = (x.repeat_interleave(group, 1) for x in (key, value, visible))
    scores = query @ key.mT * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    logits = scores.masked_fill(~visible, NEG_INF)
    if sinks is not None:
        column = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, q_len, 1)
        logits = torch.cat([logits, column], -1)
    none = logits.new_full((*logits.shape[:3], 1), NEG_INF)  # so that there is one, without a key
    top = torch.cat([logits.detach(), none], -1).amax(-1, keepdim=True)
    empty = top == NEG_INF
    shares = torch.exp(logits - top.masked_fill(empty, 0.0))
    total = shares.sum(-1, keepdim=True)
    out = shares[..., :kv_len] / total.masked_fill(empty, 1.0) @ value
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, NEG_INF)[..., 0]
    lse = lse.to(torch.promote_types(query.dtype, torch.float32))
    return (out, lse) if return_lse else out


def block_summaries(
    key: Tensor,
    landmarks: Tensor | None = None,
    *,
    block_size: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key (B, Hkv, blocks, M, D) and log count (B, Hkv, blocks, M) under each landmark, and
    the membership (blocks, Nk) of the tokens.

    Of packed sequences some blocks at the end may be empty.
    """
    kv_len, dim = key.shape[2:]
    starts = _starts(kv_len, cu_seqlens, key.device)
    if key_mask is not None:  # hidden keys may hold anything
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
    place = torch.arange(kv_len, device=key.device) - starts
    ids = (place % block_size == 0).cumsum(0) - 1
    blocks = -(-kv_len // block_size)
    if cu_seqlens is not None:  # at least as many as there are
        blocks = kv_len // block_size + cu_seqlens.shape[0] - 1
    member = ids == torch.arange(blocks, device=key.device)[:, None]  # (blocks, Nk)
    if landmarks is None:
        shares = key.new_ones(*key.shape[:3], 1)
    else:
        factor = 1 / math.sqrt(dim) if scale is None else scale
        shares = torch.softmax(factor * key @ landmarks.to(key.dtype).mT, -1)  # (B, Hkv, Nk, M)
    if key_mask is not None:
        shares = shares.masked_fill(~key_mask[:, None, :, None], 0.0)
    # zeros by selection: tokens of other blocks may be NaN, and no block depends on them
    weights = torch.where(member[:, None], shares.mT[:, :, None], 0.0)  # (B, Hkv, blocks, M, Nk)
    counts = weights.sum(-1)
    own = torch.where(member[..., None], key[:, :, None], 0.0)  # (B, Hkv, blocks, Nk, D)
    means = weights @ own / counts.masked_fill(counts == 0, 1.0)[..., None]
    return means, counts.log(), member


def block_scores(
    query: Tensor,
    key: Tensor,
    landmarks: Tensor | None = None,
    *,
    block_size: int = 64,
    near: int = 1,
    scale: float | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Scores of the finished blocks, as `flashmark.block_scores`."""
    (batch, _, q_len, dim), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    if kv_lengths is not None:
        inside = torch.arange(kv_len, device=key.device) < kv_lengths.view(-1, 1)
        key_mask = inside if key_mask is None else inside & key_mask
    means, logs, member = block_summaries(
        key, landmarks, block_size=block_size, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens
    )
    factor = 1 / math.sqrt(dim) if scale is None else scale
    grouped = query.unflatten(1, (kv_heads, -1))  # (B, Hkv, G, Nq, D)
    each = factor * torch.einsum("bhgid,bhcmd->bhgicm", grouped, means)
    each = each + logs[:, :, None, None]
    empty = logs.amax(3) == NEG_INF  # (B, Hkv, blocks): hidden keys alone
    each = torch.logsumexp(each.masked_fill(empty[:, :, None, None, :, None], 0.0), 5)
    at, first = _places(q_len, kv_len, query_offset, cu_seqlens, query.device)
    own = (at - first).div(block_size, rounding_mode="floor")[..., None]
    number = torch.arange(-(-kv_len // block_size), device=query.device)
    base = torch.zeros_like(first)  # the first block of its sequence
    if kv_len:
        base = member.int().argmax(0)[first.clamp(0)]
    pick = (base[..., None] + number).clamp(max=max(0, len(member) - 1))[:, None]  # (B|1, 1, Nq, C)
    each = each.gather(4, pick[:, :, None].expand(batch, kv_heads, each.shape[2], -1, -1))
    none = empty[:, :, None].expand(-1, -1, q_len, -1)
    none = none.gather(3, pick.expand(batch, kv_heads, -1, -1))
    none = none | (number >= own - near)[:, None] | each.isnan().any(2)  # (B, Hkv, Nq, C)
    each = each.clamp(max=torch.finfo(each.dtype).max)
    each = each.masked_fill(none[:, :, None], torch.finfo(each.dtype).min)
    scores = torch.logsumexp(torch.log_softmax(each, 4), 2) - math.log(max(1, each.shape[2]))
    return scores.masked_fill(none, NEG_INF)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None = None,
    *,
    block_size: int = 64,
    top_k: int = 16,
    near: int = 1,
    scores: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Attention over the `top_k` blocks of highest score, as `flashmark.routed_attention`."""
    if scores is None:
        with torch.no_grad():
            scores = block_scores(
                query, key, landmarks, block_size=block_size, near=near, scale=scale,
                query_offset=query_offset, kv_lengths=kv_lengths, key_mask=key_mask,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
    indices = choose(
        scores, top_k, query.shape[2], key.shape[2], block_size=block_size, near=near,
        query_offset=query_offset, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return block_topk_attention(
        query, key, value, indices, block_size=block_size, near=near, scale=scale, softcap=softcap,
        sinks=sinks, query_offset=query_offset, kv_lengths=kv_lengths, key_mask=key_mask,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def choose(
    scores: Tensor, top_k: int, q_len: int, kv_len: int, *, block_size: int, near: int,
    query_offset=None, cu_seqlens=None,
) -> Tensor:  # fmt: skip
    """Blocks of highest score among the finished ones, ties by the lower block; -1 where none."""
    at, first = _places(q_len, kv_len, query_offset, cu_seqlens, scores.device)
    own = (at - first).div(block_size, rounding_mode="floor")[:, None, :, None]
    number = torch.arange(scores.shape[3], device=scores.device)
    scores = scores.detach().masked_fill((number >= own - near) | scores.isnan(), NEG_INF)
    best, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    return order.masked_fill(best == NEG_INF, -1)[..., :top_k].int()


def _starts(kv_len: int, cu_seqlens: Tensor | None, device) -> Tensor:
    """(Nk,): the first token of each token's sequence."""
    if cu_seqlens is None:
        return torch.zeros(kv_len, dtype=torch.int64, device=device)
    lengths = cu_seqlens.diff().long()
    return cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=kv_len)


def _places(q_len: int, kv_len: int, query_offset, cu_seqlens, device) -> tuple[Tensor, Tensor]:
    """(B|1, Nq): position of each query among the keys, and the first token of its sequence."""
    row = torch.arange(q_len, device=device)[None]
    if query_offset is None:
        at = row + kv_len - q_len
    else:
        at = row + torch.as_tensor(query_offset, device=device).reshape(-1, 1).long()
    if cu_seqlens is None:
        return at, torch.zeros_like(at)
    return at, _starts(kv_len, cu_seqlens, device)[at]
