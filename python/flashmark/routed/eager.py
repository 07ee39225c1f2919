"""Attention over chosen blocks in plain PyTorch: a tile of queries beside the keys that it gathers,
or beside all keys where these are few.

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
TILE_ELEMENTS = 2**22  # of the keys that a tile of queries gathers, or of its scores
DENSE = 16  # a gathered key costs more than this many in a product with all of them


class _Tile(NamedTuple):
    """Queries [begin, end) and the T keys beside them: those each gathers, or all."""

    queries: slice
    tokens: Tensor | None  # int64 (B, Hkv, n, T); None: all keys
    visible: Tensor  # bool (B, Hkv, 1, n, T)

    def product(self, rows: Tensor, keys: Tensor) -> Tensor:
        """(B, Hkv, G, n, T): each row times each of its keys."""
        return torch.einsum(f"bhgnd,{self._keys}->bhgnt", rows, keys)

    def weighted(self, weights: Tensor, keys: Tensor) -> Tensor:
        """(B, Hkv, G, n, D): sums over keys."""
        return torch.einsum(f"bhgnt,{self._keys}->bhgnd", weights, keys)

    def add(self, total: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add sums over the rows to `total` (B, Hkv, Nk, D), that of the keys."""
        part = torch.einsum(f"bhgnt,bhgnd->{self._keys}", weights, rows)
        if self.tokens is None:
            total += part
            return
        at = self.tokens.flatten(2)[..., None].expand(-1, -1, -1, part.shape[-1])
        total.scatter_add_(2, at, part.flatten(2, 3))

    @property
    def _keys(self) -> str:
        return "bhtd" if self.tokens is None else "bhntd"


def tiles(call: Call) -> Iterator[_Tile]:
    (batch, kv_heads, kv_len, dim), (query_heads, q_len) = call.key.shape, call.query.shape[1:3]
    size, near, device = call.block_size, call.near, call.query.device
    if kv_len == 0:
        return
    places = places_of(q_len, kv_len, call.query_offset, call.starts, size, device)
    width = (call.indices.shape[3] + near + 1) * size
    dense = kv_len <= min(DENSE, q_len) * width
    row = kv_len * query_heads if dense else kv_heads * width * max(dim, 1)
    count = max(1, TILE_ELEMENTS // max(1, batch * row))
    for begin in range(0, q_len, count):
        queries = slice(begin, min(begin + count, q_len))
        at = Places(*(x[:, queries] for x in places))
        if dense:
            yield _Tile(queries, None, _visible(call, at, queries))
        else:
            yield _Tile(queries, *_gathered(call, at, queries))


def _chosen(call: Call, own: Tensor, queries: slice) -> Tensor:
    """int64 (B, Hkv, n, K): chosen blocks that lie before the near ones; -1 for the others."""
    chosen = call.indices[:, :, queries].long()
    return chosen.masked_fill((chosen < 0) | (chosen >= own - call.near), -1)


def _visible(call: Call, places: Places, queries: slice) -> Tensor:
    """Whether each key is visible, (B, Hkv, 1, n, Nk)."""
    kv_len, size = call.key.shape[2], call.block_size
    at, first, own = (x[:, None, :, None] for x in places)  # (B|1, 1, n, 1)
    token = torch.arange(kv_len, device=at.device)
    block = torch.div(token - first, size, rounding_mode="floor")  # (B|1, 1, n, Nk)
    columns = -(-kv_len // size) + 1
    chosen = _chosen(call, own, queries) + 1  # column 0 takes those that are none
    chosen = chosen.masked_fill(chosen >= columns, 0)
    read = torch.zeros(*chosen.shape[:3], columns, dtype=torch.bool, device=at.device)
    read.scatter_(3, chosen, True)
    read[..., 0] = False
    visible = read.gather(3, (block + 1).clamp(min=0).expand(*chosen.shape[:3], -1))
    visible = visible | (block >= own - call.near)
    visible = visible & (token >= first) & (token <= at)
    if call.kv_lengths is not None:
        visible = visible & (token < call.kv_lengths.long().view(-1, 1, 1, 1))
    if call.key_mask is not None:
        visible = visible & call.key_mask[:, None, None]
    return visible[:, :, None]


def _gathered(call: Call, places: Places, queries: slice) -> tuple[Tensor, Tensor]:
    """Tokens of the tile, and whether each is visible."""
    (batch, kv_heads, kv_len, _), size = call.key.shape, call.block_size
    at, first, own = (x[:, None, :, None] for x in places)  # (B|1, 1, n, 1)
    back = torch.arange(call.near, -1, -1, device=at.device)
    close = (own - back).expand(batch, kv_heads, -1, -1)
    block = torch.cat([_chosen(call, own, queries), close], -1)[..., None]
    step = torch.arange(size, device=at.device)
    tokens = first[..., None] + block * size + step  # (B, Hkv, n, K + near + 1, s)
    visible = (block >= 0) & (tokens <= at[..., None])
    tokens = tokens.clamp(0, kv_len - 1)
    if call.kv_lengths is not None:
        visible = visible & (tokens < call.kv_lengths.long().view(-1, 1, 1, 1, 1))
    if call.key_mask is not None:
        sample = torch.arange(batch, device=at.device).view(-1, 1, 1, 1, 1)
        visible = visible & call.key_mask[sample, tokens]
    return tokens.flatten(3), visible.flatten(3)[:, :, None]


class Work:
    """A call in the dtype of its sums."""

    def __init__(self, call: Call):
        self.call = call
        self.dtype = torch.promote_types(call.query.dtype, torch.float32)
        self.kv_heads = call.key.shape[1]
        batch, device = call.query.shape[0], call.query.device
        self.sample = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        self.head = torch.arange(self.kv_heads, device=device).view(1, -1, 1, 1)
        self.hidden = None if call.key_mask is None else ~call.key_mask  # bool (B, Nk)
        if call.kv_lengths is not None:
            beyond = torch.arange(call.key.shape[2], device=device) >= call.kv_lengths[:, None]
            self.hidden = beyond if self.hidden is None else self.hidden | beyond

    def of_queries(self, x: Tensor, tile: _Tile) -> Tensor:
        """(B, Hkv, G, n, ...)."""
        return x[:, :, tile.queries].unflatten(1, (self.kv_heads, -1)).to(self.dtype)

    def of_keys(self, x: Tensor, tile: _Tile) -> Tensor:
        """(B, Hkv, n, T, D), or all (B, Hkv, Nk, D); 0 where no query may look: memory there may
        hold anything."""
        if tile.tokens is None:
            x = x.to(self.dtype)
            return x if self.hidden is None else x.masked_fill(self.hidden[:, None, :, None], 0.0)
        found = x[self.sample, self.head, tile.tokens].to(self.dtype)
        return found.masked_fill_(~tile.visible[:, :, 0, ..., None], 0.0)

    def scores(self, q: Tensor, k: Tensor, tile: _Tile) -> tuple[Tensor, Tensor | None]:
        """Logits (B, Hkv, G, n, T), and the tanh of the cap."""
        s = tile.product(q, k) * self.call.scale
        tanh = None
        if self.call.softcap:
            tanh = torch.tanh(s / self.call.softcap)
            s = self.call.softcap * tanh
        return s.masked_fill(~tile.visible, NEG_INF), tanh


def forward(call: Call) -> Saved:
    """Outputs of validated inputs; shapes as in `flashmark.block_topk_attention`."""
    query, work = call.query, Work(call)
    out = query.new_zeros(*query.shape[:3], call.value.shape[3])
    lse = query.new_full(query.shape[:3], NEG_INF, dtype=work.dtype)
    sink = None
    if call.sinks is not None:
        lse.copy_(call.sinks[:, None])  # the result of a row that sees no key
        sink = call.sinks.to(work.dtype).unflatten(0, (work.kv_heads, -1))[..., None, None]
    for tile in tiles(call):
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
        o = tile.weighted(p, v) / total.masked_fill(total == 0.0, 1.0)
        out[:, :, tile.queries] = o.flatten(1, 2).to(out.dtype)
        lse[:, :, tile.queries] = (top + total.log())[..., 0].flatten(1, 2)
    return Saved(out, lse)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of query, key, value and sinks."""
    query, work, (out, lse) = call.query, Work(call), saved
    dq = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape, dtype=work.dtype) for x in (call.key, call.value))
    delta = (dout.to(work.dtype) * out.to(work.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    finite = lse.masked_fill(lse == NEG_INF, float("inf"))  # exp(S - inf) = 0
    for tile in tiles(call):
        q, do = work.of_queries(query, tile), work.of_queries(dout, tile)
        k, v = (work.of_keys(x, tile) for x in (call.key, call.value))
        s, tanh = work.scores(q, k, tile)
        p = torch.exp(s - work.of_queries(finite, tile)[..., None])
        ds = tile.product(do, v)
        ds = (ds - work.of_queries(delta, tile)[..., None]) * p
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = ds * call.scale
        dq[:, :, tile.queries] = tile.weighted(ds, k).flatten(1, 2).to(dq.dtype)
        tile.add(dk, ds, q)
        tile.add(dv, p, do)
    dsinks = None
    if call.sinks is not None:
        weight = torch.exp(call.sinks.to(work.dtype)[:, None] - finite)
        dsinks = -(weight * delta).sum((0, 2)).to(call.sinks.dtype)
    return Grads(dq, dk.to(call.key.dtype), dv.to(call.value.dtype), dsinks)
