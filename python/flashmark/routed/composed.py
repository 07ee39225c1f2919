"""Attention over chosen blocks out of differentiable PyTorch functions.

Values come from the kernels; this is for forward mode and for derivatives of gradients. What
autograd keeps are the visible keys of every query, gathered.
"""

from __future__ import annotations

import torch

from flashmark.routed.call import Call, Saved
from flashmark.routed.eager import NEG_INF, Work, tiles


def forward(call: Call) -> Saved:
    """Outputs of a call."""
    query, work = call.query, Work(call)
    outs, logs, sink = [], [], None
    if call.sinks is not None:
        sink = call.sinks.to(work.dtype).unflatten(0, (work.kv_heads, -1))[..., None, None]
    for tile in tiles(call):
        q = work.of_queries(query, tile)
        k, v = (work.of_keys(x, tile) for x in (call.key, call.value))
        s, _ = work.scores(q, k, tile)
        logits = s if sink is None else torch.cat([s, sink.expand(*s.shape[:4], 1)], 4)
        top = logits.detach().amax(-1, keepdim=True)
        top = top.masked_fill(top == NEG_INF, 0.0)  # a row that sees no key
        shares = torch.exp(logits - top)
        total = shares.sum(-1, keepdim=True)
        empty = total == 0.0
        total = total.masked_fill(empty, 1.0)
        out = tile.weighted(shares[..., : s.shape[4]] / total, v)
        outs.append(out.flatten(1, 2).to(query.dtype))
        logs.append((top + torch.log(total)).masked_fill(empty, NEG_INF)[..., 0].flatten(1, 2))
    if outs:
        return Saved(torch.cat(outs, 2), torch.cat(logs, 2))
    lse = query.new_full(query.shape[:3], NEG_INF, dtype=work.dtype)
    if call.sinks is not None:
        lse = call.sinks.to(work.dtype)[:, None].expand(query.shape[:3])
    nothing = 0.0 * (query.sum() + call.key.sum() + call.value.sum())
    return Saved(nothing.expand(*query.shape[:3], call.value.shape[3]), lse)
