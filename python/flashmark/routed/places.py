"""Positions of queries, and the blocks that tokens lie in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Places of queries among the keys, int64 (B, Nq) or (1, Nq) each."""

    at: Tensor  # position; below 0 where the query comes before all keys
    first: Tensor  # first token of the query's sequence
    own: Tensor  # block of the query, counted from `first`


def starts_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 (tokens,): the first token of each token's sequence."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return cu_seqlens[sequence.clamp(max=cu_seqlens.shape[0] - 2)].to(torch.int32)


def places_of(
    q_len: int, kv_len: int, query_offset: Tensor | None, starts: Tensor | None, block_size: int,
    device,
) -> Places:  # fmt: skip
    """Places of `q_len` queries."""
    row = torch.arange(q_len, device=device)[None]
    offset = kv_len - q_len if query_offset is None else query_offset.long()[:, None]
    at = row + offset
    if starts is None:
        first = torch.zeros_like(at)
    else:
        first = starts.long()[at.clamp(0, max(0, kv_len - 1))] if kv_len else torch.zeros_like(at)
    return Places(at, first, torch.div(at - first, block_size, rounding_mode="floor"))


class Blocks(NamedTuple):
    """Blocks of the keys of all sequences, numbered one after the other."""

    tokens: Tensor  # int64 (C, block_size); clamped to the keys there are
    inside: Tensor  # bool (C, block_size): the token is there, in the block's own sequence
    base: Tensor | None  # int64 (Nk,): number of the first block of a token's sequence; None: 0


def blocks_of(
    kv_len: int, starts: Tensor | None, sequences: int, block_size: int, device, first: int = 0
) -> Blocks:
    """All blocks from number `first` on; with several sequences some at the end may be empty."""
    step = torch.arange(block_size, device=device)
    if starts is None:
        count = -(-kv_len // block_size)
        tokens = torch.arange(first, count, device=device)[:, None] * block_size + step
        return Blocks(tokens.clamp(max=max(0, kv_len - 1)), tokens < kv_len, None)
    token = torch.arange(kv_len, device=device)
    if kv_len == 0:
        return Blocks(token.view(0, 1) + step, token.view(0, 1) < step, token)
    opens = (token - starts) % block_size == 0
    number = opens.cumsum(0) - 1  # (Nk,)
    count = kv_len // block_size + sequences  # at least as many as there are
    heads = torch.full((count + 1,), kv_len, dtype=torch.int64, device=device)
    heads.scatter_(0, torch.where(opens, number, count), token)
    tokens = heads[:count, None] + step  # a head at kv_len: there is no such block
    clamped = tokens.clamp(max=max(0, kv_len - 1))
    own = starts[clamped[:, :1]] == starts[clamped]
    return Blocks(clamped, (tokens < kv_len) & own, number[starts.long()])
