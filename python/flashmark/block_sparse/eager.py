"""Block-sparse attention in tiled PyTorch: every query block against the keys it sees, softmax over
whole rows.

S = cap(scale q k^T) + bias, P = exp(S - lse), out = P v
lse is kept as float32 (float64) and its rounding residual: beside a bias of -1e9 the logarithm of
the sum would be lost, and with it P.
dS = P * (dO v^T - Delta), Delta = rowsum(dO * out) - dlse
dq = scale dS k, dk = scale dS^T q, dv = P^T dO, dsink = -sum exp(sink - lse) Delta
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.block_sparse.call import Call, Grads, Saved
from flashmark.block_sparse.eager_bias import Bias
from flashmark.block_sparse.eager_tiles import Row, rows
from flashmark.block_sparse.philox import keep_mask

NEG_INF = float("-inf")


class Scores:
    """Scores of a call, row by row: both passes form them."""

    def __init__(self, call: Call):
        self.query, self.key, self.kv_lengths = call.query, call.key, call.kv_lengths
        self.softcap, self.dropout_p = call.softcap, call.dropout_p
        self.seed = int(call.dropout_seed) if call.dropout_p > 0.0 else 0
        self.bias = None if call.bias is None else Bias(call.bias, call.mask.q_len, self.dtype)

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Accumulation dtype."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def of_queries(self, x: Tensor, row: Row) -> Tensor:
        """Tile of a query-shaped tensor as (batch, kv heads, group * queries, dim)."""
        tile = x[row.batch, row.heads, row.queries].to(self.dtype)
        count = row.heads.stop - row.heads.start
        return tile.unflatten(1, (-1, min(self.group, count))).flatten(2, 3)

    def kv_heads(self, row: Row) -> slice:
        return slice(row.heads.start // self.group, (row.heads.stop - 1) // self.group + 1)

    def of_keys(self, x: Tensor, row: Row) -> Tensor:
        """The keys that the row sees, from a key-shaped tensor: (batch, kv heads, width, dim)."""
        x = x[row.batch, self.kv_heads(row)]
        parts = [x[:, :, start:stop].to(self.dtype) for start, stop in row.segments]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if self.kv_lengths is None:
            return x
        return x.masked_fill(self.beyond(row).transpose(-1, -2), 0.0)  # memory may hold anything

    def beyond(self, row: Row) -> Tensor:
        """Keys behind a sample's length, bool (batch, 1, 1, width)."""
        device = self.query.device
        keys = torch.cat([torch.arange(*segment, device=device) for segment in row.segments])
        return keys >= self.kv_lengths[row.batch].view(-1, 1, 1, 1)

    def by_heads(self, x: Tensor, row: Row) -> Tensor:
        """(batch, kv heads, group * queries, n) seen as (batch, heads, queries, n)."""
        return x.unflatten(2, (-1, row.queries.stop - row.queries.start)).flatten(1, 2)

    def by_groups(self, x: Tensor, row: Row) -> Tensor:
        count = row.heads.stop - row.heads.start
        return x.unflatten(1, (-1, min(self.group, count))).flatten(2, 3)

    def of(self, q: Tensor, k: Tensor, row: Row) -> tuple[Tensor, Tensor | None]:
        """Masked scores (batch, heads, queries, width), and tanh(S / softcap) or None."""
        s, tanh = self.by_heads(q @ k.transpose(-1, -2), row), None
        if self.softcap:
            tanh = torch.tanh(s / self.softcap)
            s = self.softcap * tanh
        if self.bias is not None:
            self.bias.add_to(s, row)
        for column, hidden in row.hidden:
            hidden = hidden.to(s.device)
            s[..., column : column + hidden.shape[1]].masked_fill_(hidden, NEG_INF)
        if self.kv_lengths is not None:
            s.masked_fill_(self.beyond(row), NEG_INF)
        return s, tanh

    def dropout(self, row: Row) -> Tensor:
        """0 where dropped, 1 / (1 - p) where kept."""
        device = self.query.device
        batch = torch.arange(row.batch.start, row.batch.stop, device=device)
        heads = torch.arange(row.heads.start, row.heads.stop, device=device)
        bh = batch[:, None] * self.query.shape[1] + heads
        queries = torch.arange(row.queries.start, row.queries.stop, device=device)
        parts = [keep_mask(self.seed, self.dropout_p, bh, queries, *seg) for seg in row.segments]
        return torch.cat(parts, dim=-1).to(self.dtype) / (1.0 - self.dropout_p)


def forward(call: Call) -> Saved:
    """Outputs of validated inputs; shapes as in `flashmark.block_sparse_attention`."""
    query, key, value, sinks = call.query, call.key, call.value, call.sinks
    scores = Scores(call)
    shape = tuple(query.shape[:3])
    out = query.new_zeros(*shape, value.shape[3])
    lse = query.new_full(shape, NEG_INF, dtype=scores.dtype)
    residual = lse.new_zeros(0 if call.bias is None else shape)
    if sinks is not None:
        lse.copy_(sinks[:, None])  # the result of a row that sees no key
    for row in rows(call.mask, shape, scores.group, call.query_offset, call.kv_lengths):
        q = scores.of_queries(query, row) * call.scale
        s, _ = scores.of(q, scores.of_keys(key, row), row)
        m = s.amax(-1, keepdim=True)
        if sinks is not None:
            sink = sinks[row.heads].to(scores.dtype).view(-1, 1, 1)
            m = torch.maximum(m, sink)
        m = m.masked_fill(m == NEG_INF, 0.0)  # a row that sees no key
        p = s.sub_(m).exp_()
        total = p.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sink - m)
        if call.dropout_p > 0.0:
            p *= scores.dropout(row)
        o = scores.by_groups(p, row) @ scores.of_keys(value, row)
        o = scores.by_heads(o, row) / total.masked_fill(total == 0.0, 1.0)
        out[row.batch, row.heads, row.queries] = o.to(out.dtype)
        at, log_total = (row.batch, row.heads, row.queries), total.log()
        lse[at] = (m + log_total).squeeze(-1)
        if call.bias is not None:  # 0 where the row sees nothing
            rest = ((m - (m + log_total)) + log_total).nan_to_num_(0.0)
            residual[at] = rest.squeeze(-1)
    return Saved(out, lse, residual)


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of query, key, value, bias and sinks, summed in a fixed order."""
    query, key, value, sinks = call.query, call.key, call.value, call.sinks
    scores, (out, lse, residual) = Scores(call), saved
    dtype = scores.dtype
    dq = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    unseen = lse == NEG_INF
    finite_lse = lse.masked_fill(unseen, float("inf"))  # exp(S - inf) = 0
    for row in rows(
        call.mask, tuple(query.shape[:3]), scores.group, call.query_offset, call.kv_lengths
    ):
        at = (row.batch, row.heads, row.queries)
        q, k, v = (
            scores.of_queries(query, row) * call.scale,
            *(scores.of_keys(x, row) for x in (key, value)),
        )
        do = scores.of_queries(dout, row)
        s, tanh = scores.of(q, k, row)
        s.sub_(finite_lse[at].unsqueeze(-1))
        if call.bias is not None:
            s.sub_(residual[at].unsqueeze(-1))
        p = s.exp_()
        dp = scores.by_heads(do @ v.transpose(-1, -2), row)
        weights = p
        if call.dropout_p > 0.0:
            keep = scores.dropout(row)
            weights, dp = p * keep, dp * keep
        dv_row = scores.by_groups(weights, row).transpose(-1, -2) @ do
        ds = dp.sub_(delta[at].unsqueeze(-1)).mul_(p)  # dS = P * (dP - Delta)
        if scores.bias is not None:
            scores.bias.accumulate(ds, row)
        if tanh is not None:
            ds *= 1.0 - tanh * tanh
        ds = scores.by_groups(ds, row)
        dq[at] = scores.by_heads((ds @ k) * call.scale, row).to(dq.dtype)
        _scatter_add(dk, ds.transpose(-1, -2) @ q, row, scores)  # q carries the scale
        _scatter_add(dv, dv_row, row, scores)
    dsinks = None
    if sinks is not None:
        weight = torch.exp(
            sinks.to(dtype)[:, None] - finite_lse - (0.0 if call.bias is None else residual)
        )
        dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    dbias = None if scores.bias is None else scores.bias.gradient()
    return Grads(dq, dk.to(key.dtype), dv.to(value.dtype), dbias, dsinks)


def _scatter_add(total: Tensor, part: Tensor, row: Row, scores: Scores) -> None:
    target, column = total[row.batch, scores.kv_heads(row)], 0
    for start, stop in row.segments:
        target[:, :, start:stop] += part[:, :, column : column + stop - start]
        column += stop - start
