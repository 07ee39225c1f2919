"""Block-sparse attention out of differentiable PyTorch functions, row by row of the mask.

Values come from the kernels; this is for what they have no formula for: derivatives of gradients.
Nothing is computed in place and no value of a differentiable tensor is read, so every transform
of PyTorch goes through. What autograd keeps are the visible tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.block_sparse.call import Call, Saved
from flashmark.block_sparse.eager_tiles import Row, rows
from flashmark.block_sparse.philox import keep_mask

NEG_INF = float("-inf")


def forward(call: Call) -> Saved:
    """Outputs of a call; the rounding residual is left empty."""
    query, key, value = call.query, call.key, call.value
    dtype = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, q_len, _), device = query.shape, query.device
    group = heads // key.shape[1]
    place = torch.full((batch, heads, q_len), -1, device=device)  # row of `outs`, -1: sees nothing
    outs, logs, count = [], [], 0
    for row in rows(call.mask, (batch, heads, q_len), group, call.query_offset, call.kv_lengths):
        out, lse = _row(call, row, group, dtype)
        at = place[row.batch, row.heads, row.queries]
        at.copy_(torch.arange(count, count + at.numel(), device=device).view(at.shape))
        count += at.numel()
        outs.append(out.reshape(-1, out.shape[-1]))
        logs.append(lse.reshape(-1))
    if call.sinks is None:
        nothing = query.new_full((batch, heads, q_len), NEG_INF, dtype=dtype)
    else:
        nothing = call.sinks.to(dtype)[:, None].expand(batch, heads, q_len)
    if not outs:
        out = (query.sum() + key.sum() + value.sum()).to(dtype) * 0.0
        out = out.expand(batch, heads, q_len, value.shape[3])
        return Saved(out.to(query.dtype), nothing, nothing.new_zeros(0))
    unseen, flat = place < 0, place.clamp(min=0).flatten()
    out = torch.cat(outs).index_select(0, flat).unflatten(0, place.shape)
    lse = torch.cat(logs).index_select(0, flat).unflatten(0, place.shape)
    out = out.masked_fill(unseen.unsqueeze(-1), 0.0)
    return Saved(out.to(query.dtype), torch.where(unseen, nothing, lse), nothing.new_zeros(0))


def _row(call: Call, row: Row, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(batch, heads, queries, Dv) and (batch, heads, queries) of one row."""
    heads = slice(row.heads.start // group, (row.heads.stop - 1) // group + 1)
    count = min(group, row.heads.stop - row.heads.start)
    q = call.query[row.batch, row.heads, row.queries].to(dtype).unflatten(1, (-1, count))
    k, v = (
        torch.cat([x[row.batch, heads, start:stop] for start, stop in row.segments], 2)
        .to(dtype).unsqueeze(2) for x in (call.key, call.value)
    )  # fmt: skip
    keys = torch.cat([torch.arange(*segment, device=q.device) for segment in row.segments])
    hidden = _hidden(row, q.device)
    if call.kv_lengths is not None:
        beyond = keys >= call.kv_lengths[row.batch].view(-1, 1, 1, 1)
        hidden = beyond if hidden is None else hidden | beyond
        k, v = (x.masked_fill(beyond.unsqueeze(1).mT, 0.0) for x in (k, v))  # may hold anything
    s = ((q @ k.mT) * call.scale).flatten(1, 2)  # (batch, heads, queries, width)
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + _bias(call.bias, row, keys, call.mask.q_len).to(dtype)
    if hidden is not None:
        s = s.masked_fill(hidden, NEG_INF)
    logits = s
    if call.sinks is not None:
        sink = call.sinks[row.heads].to(dtype).view(-1, 1, 1)
        logits = torch.cat([s, sink.expand(*s.shape[:3], 1)], 3)
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)  # a row that sees no key
    shares = torch.exp(logits - top)
    total = shares.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    p = shares[..., : s.shape[3]] / total
    if call.dropout_p > 0.0:
        p = p * _dropout(call, row).to(dtype) / (1.0 - call.dropout_p)
    out = (p.unflatten(1, (-1, count)) @ v).flatten(1, 2)
    lse = (top + torch.log(total)).masked_fill(empty, NEG_INF)
    return out, lse.squeeze(-1)


def _hidden(row: Row, device: torch.device) -> Tensor | None:
    """Bits of the row's partial tiles, bool (queries, width)."""
    if not row.hidden:
        return None
    count = row.queries.stop - row.queries.start
    hidden = torch.zeros(count, row.width, dtype=torch.bool, device=device)
    for column, tile in row.hidden:
        hidden[:, column : column + tile.shape[1]] = tile.to(device)
    return hidden


def _bias(bias: Tensor, row: Row, keys: Tensor, mask_rows: int) -> Tensor:
    """Tile of the bias for a row, broadcastable to (batch, heads, queries, width)."""
    if bias.dim() == 2:
        count = row.queries.stop - row.queries.start
        rows_of = torch.arange(row.first_row, row.first_row + count, device=keys.device)
        return bias[row.heads][:, keys - rows_of[:, None] + mask_rows - 1]
    at = (row.batch, row.heads, row.queries)
    parts = [slice(None) if n == 1 else x for n, x in zip(bias.shape, at, strict=False)]
    tile = bias[tuple(parts)]
    return tile if bias.shape[3] == 1 else tile.index_select(3, keys)


def _dropout(call: Call, row: Row) -> Tensor:
    """The keep mask of the row."""
    device = call.query.device
    batch = torch.arange(row.batch.start, row.batch.stop, device=device)
    heads = torch.arange(row.heads.start, row.heads.stop, device=device)
    queries = torch.arange(row.queries.start, row.queries.stop, device=device)
    which = batch[:, None] * call.query.shape[1] + heads
    seed = int(call.dropout_seed)  # type: ignore[arg-type]
    parts = [keep_mask(seed, call.dropout_p, which, queries, *seg) for seg in row.segments]
    return torch.cat(parts, -1)
