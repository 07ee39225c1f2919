"""Block-sparse attention and its tangents in one pass of tiled PyTorch, in linear memory.

dS = cap'(scale q k^T) scale (dq k^T + q dk^T) + dbias
dlse = sum P dS + P_sink dsink
dout = (P * (dS - dlse)) v + P dv
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.block_sparse.call import Call, Grads, Saved
from flashmark.block_sparse.eager import NEG_INF, Scores
from flashmark.block_sparse.eager_bias import Bias
from flashmark.block_sparse.eager_tiles import Row, rows


def jvp(call: Call, tangents: Grads) -> tuple[Saved, tuple[Tensor, Tensor]]:
    """Outputs, and the tangents of out and lse; a tangent of None is zero."""
    query, scores = call.query, Scores(call)
    shape, dtype = tuple(query.shape[:3]), scores.dtype
    tquery, tkey, tvalue, tbias, tsinks = tangents
    tbias = None if tbias is None else Bias(tbias, call.mask.q_len, dtype)
    out = query.new_zeros(*shape, call.value.shape[3])
    lse = query.new_full(shape, NEG_INF, dtype=dtype)
    residual = lse.new_zeros(0 if call.bias is None else shape)
    tout, tlse = torch.zeros_like(out), torch.zeros_like(lse)
    if call.sinks is not None:  # the result of a row that sees no key
        lse.copy_(call.sinks[:, None])
    if tsinks is not None:
        tlse.copy_(tsinks[:, None])
    for row in rows(call.mask, shape, scores.group, call.query_offset, call.kv_lengths):
        at = (row.batch, row.heads, row.queries)
        q, k = scores.of_queries(query, row) * call.scale, scores.of_keys(call.key, row)
        s, tanh = scores.of(q, k, row)
        ds = _tangents_of_scores(scores, row, q, k, tquery, tkey, call.scale)
        if ds is not None and tanh is not None:
            ds *= 1.0 - tanh * tanh
        if tbias is not None:
            ds = torch.zeros_like(s) if ds is None else ds
            tbias.add_to(ds, row)
        m = s.amax(-1, keepdim=True)
        if call.sinks is not None:
            sink = call.sinks[row.heads].to(dtype).view(-1, 1, 1)
            m = torch.maximum(m, sink)
        m = m.masked_fill(m == NEG_INF, 0.0)  # a row that sees no key
        p = s.sub_(m).exp_()
        total = p.sum(-1, keepdim=True)
        if call.sinks is not None:
            total = total + torch.exp(sink - m)
        divisor = total.masked_fill(total == 0.0, 1.0)
        log_total = total.log()
        lse[at] = (m + log_total).squeeze(-1)
        if call.bias is not None:  # 0 where the row sees nothing
            residual[at] = ((m - (m + log_total)) + log_total).nan_to_num_(0.0).squeeze(-1)
        p /= divisor
        if ds is not None:  # what a hidden key holds, NaN included, reaches no tangent
            ds.masked_fill_(p == 0.0, 0.0)
        weights, keep = p, None
        if call.dropout_p > 0.0:
            keep = scores.dropout(row)
            weights = p * keep
        v = scores.of_keys(call.value, row)
        out[at] = scores.by_heads(scores.by_groups(weights, row) @ v, row).to(out.dtype)
        t = s.new_zeros(()) if ds is None else (p * ds).sum(-1, keepdim=True)
        if tsinks is not None:
            tsink = tsinks[row.heads].to(dtype).view(-1, 1, 1)
            t = t + torch.exp(sink - m) / divisor * tsink
        tlse[at] = t.expand(*s.shape[:3], 1).squeeze(-1)
        ds = -t if ds is None else ds.sub_(t)
        found = scores.by_groups(ds * weights, row) @ v
        if tvalue is not None:
            found += scores.by_groups(weights, row) @ scores.of_keys(tvalue, row)
        tout[at] = scores.by_heads(found, row).to(out.dtype)
    return Saved(out, lse, residual), (tout, tlse)


def _tangents_of_scores(
    scores: Scores, row: Row, q: Tensor, k: Tensor, tquery: Tensor | None, tkey: Tensor | None,
    scale: float,
) -> Tensor | None:  # fmt: skip
    """scale (dq k^T + q dk^T), (batch, heads, queries, width)."""
    found = None
    if tquery is not None:
        found = (scores.of_queries(tquery, row) * scale) @ k.mT
    if tkey is not None:
        other = q @ scores.of_keys(tkey, row).mT
        found = other if found is None else found.add_(other)
    return None if found is None else scores.by_heads(found, row)
