"""Attention over chosen blocks in plain PyTorch: a tile of queries beside the keys that it gathers.

S = cap(scale q k^T), P = exp(S - lse), out = P v
dS = P * (dO v^T - Delta), Delta = rowsum(dO * out) - dlse
dq = scale dS k, dk = scale dS^T q, dv = P^T dO, dsink = -sum exp(sink - lse) Delta
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.routed.call import Call, Grads, Saved
from flashmark.routed.places import Places, places_of

NEG_INF = float("-inf")
TILE_ELEMENTS = 2**22  # of the keys that a tile of queries gathers


class _Tile(NamedTuple):
    """Queries [begin, end) and the T keys that each of them gathers."""

    queries: slice
    tokens: Tensor  # int64 (B, Hkv, n, T)
    visible: Tensor  # bool (B, Hkv, 1, n, T)


def _tiles(call: Call) -> Iterator[_Tile]:
    (batch, kv_heads, kv_len, dim), q_len = call.key.shape, call.query.shape[2]
    size, near, device = call.block_size, call.near, call.query.device
    if kv_len == 0:
        return
    places = places_of(q_len, kv_len, call.query_offset, call.starts, size, device)
    width = (call.indices.shape[3] + near + 1) * size
    count = max(1, TILE_ELEMENTS // max(1, batch * kv_heads * width * max(dim, 1)))
    for begin in range(0, q_len, count):
        queries = slice(begin, min(begin + count, q_len))
        yield _Tile(queries, *_gathered(call, Places(*(x[:, queries] for x in places)), queries))


def _gathered(call: Call, places: Places, queries: slice) -> tuple[Tensor, Tensor]:
    """Tokens of the tile, and whether each is visible."""
    (batch, kv_heads, kv_len, _), size, near = call.key.shape, call.block_size, call.near
    at, first, own = (x[:, None, :, None] for x in places)  # (B|1, 1, n, 1)
    back = torch.arange(near, -1, -1, device=at.device)
    chosen = call.indices[:, :, queries].long()
    chosen = chosen.masked_fill((chosen < 0) | (chosen >= own - near), -1)
    close = (own - back).expand(batch, kv_heads, -1, -1)
    block = torch.cat([chosen, close], -1)[..., None]  # (B, Hkv, n, K + near + 1, 1)
    step = torch.arange(size, device=at.device)
    tokens = first[..., None] + block * size + step
    visible = (block >= 0) & (tokens <= at[..., None])
    tokens = tokens.clamp(0, kv_len - 1)
    if call.kv_lengths is not None:
        visible = visible & (tokens < call.kv_lengths.long().view(-1, 1, 1, 1, 1))
    if call.key_mask is not None:
        sample = torch.arange(batch, device=at.device).view(-1, 1, 1, 1, 1)
        visible = visible & call.key_mask[sample, tokens]
    return tokens.flatten(3), visible.flatten(3)[:, :, None]


class _Work:
    """A call in the dtype of its sums."""

    def __init__(self, call: Call):
        self.call = call
        self.dtype = torch.promote_types(call.query.dtype, torch.float32)
        self.kv_heads = call.key.shape[1]
        batch, device = call.query.shape[0], call.query.device
        self.sample = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        self.head = torch.arange(self.kv_heads, device=device).view(1, -1, 1, 1)

    def of_queries(self, x: Tensor, tile: _Tile) -> Tensor:
        """(B, Hkv, G, n, ...)."""
        return x[:, :, tile.queries].unflatten(1, (self.kv_heads, -1)).to(self.dtype)

    def of_keys(self, x: Tensor, tile: _Tile) -> Tensor:
        """(B, Hkv, n, T, D), 0 where no query may look: memory there may hold anything."""
        found = x[self.sample, self.head, tile.tokens].to(self.dtype)
        return found.masked_fill_(~tile.visible[:, :, 0, ..., None], 0.0)

    def scores(self, q: Tensor, k: Tensor, tile: _Tile) -> tuple[Tensor, Tensor | None]:
        """Logits (B, Hkv, G, n, T), and the tanh of the cap."""
        s = torch.einsum("bhgnd,bhntd->bhgnt", q, k) * self.call.scale
        tanh = None
        if self.call.softcap:
            tanh = torch.tanh(s / self.call.softcap)
            s = self.call.softcap * tanh
        return s.masked_fill(~tile.visible, NEG_INF), tanh


def forward(call: Call) -> Saved:
    """Outputs of validated inputs; shapes as in `flashmark.block_topk_attention`."""
    query, work = call.query, _Work(call)
    out = query.new_zeros(*query.shape[:3], call.value.shape[3])
    lse = query.new_full(query.shape[:3], NEG_INF, dtype=work.dtype)
    sink = None
    if call.sinks is not None:
        lse.copy_(call.sinks[:, None])  # the result of a row that sees no key
        sink = call.sinks.to(work.dtype).unflatten(0, (work.kv_heads, -1))[..., None, None]
    for tile in _tiles(call):
        q, k, v = (
            work.of_queries(query, tile),
            *(work.of_keys(x, tile) for x in (call.key, call.value)),
        )
        s, _ = work.scores(q, k, tile)
        top = s.amax(-1, keepdim=True)
        if sink is not None:
            top = torch.maximum(top, sink)
        top = top.masked_fill(top == NEG_INF, 0.0)  # a row that sees no key
        p = torch.exp(s - top)
        total = p.sum(-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - top)
        o = torch.einsum("bhgnt,bhntd->bhgnd", p, v) / total.masked_fill(total == 0.0, 1.0)
        out[:, :, tile.queries] = o.flatten(1, 2).to(out.dtype)
        lse[:, :, tile.queries] = (top + total.log())[..., 0].flatten(1, 2)
    return Saved(out, lse)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of query, key, value and sinks."""
    query, work, (out, lse) = call.query, _Work(call), saved
    dq = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=work.dtype) for x in (call.key, call.value))
    delta = (dout.to(work.dtype) * out.to(work.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    finite = lse.masked_fill(lse == NEG_INF, float("inf"))  # exp(S - inf) = 0
    for tile in _tiles(call):
        q, do = work.of_queries(query, tile), work.of_queries(dout, tile)
        k, v = (work.of_keys(x, tile) for x in (call.key, call.value))
        s, tanh = work.scores(q, k, tile)
        p = torch.exp(s - work.of_queries(finite, tile)[..., None])
        ds = torch.einsum("bhgnd,bhntd->bhgnt", do, v)
        ds = (ds - work.of_queries(delta, tile)[..., None]) * p
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = ds * call.scale
        dq[:, :, tile.queries] = (
            torch.einsum("bhgnt,bhntd->bhgnd", ds, k).flatten(1, 2).to(dq.dtype)
        )
        _add(dk, torch.einsum("bhgnt,bhgnd->bhntd", ds, q), tile)
        _add(dv, torch.einsum("bhgnt,bhgnd->bhntd", p, do), tile)
    dsinks = None
    if call.sinks is not None:
        weight = torch.exp(call.sinks.to(work.dtype)[:, None] - finite)
        dsinks = -(weight * delta).sum((0, 2)).to(call.sinks.dtype)
    return Grads(dq, dk.to(call.key.dtype), dv.to(call.value.dtype), dsinks)


def _add(total: Tensor, part: Tensor, tile: _Tile) -> None:
    """Add the rows of a tile to those of the tokens that it gathered."""
    at = tile.tokens.flatten(2)[..., None].expand(-1, -1, -1, part.shape[-1])
    total.scatter_add_(2, at, part.flatten(2, 3))
