"""Nyström attention out of differentiable PyTorch functions, a chunk of tokens at a time.

Values come from the kernels; this is for forward mode and for derivatives of gradients. Nothing is
computed in place and no differentiable value is read, so every transform of PyTorch goes through.
What autograd keeps of a causal call are CHUNK * M weights for each token and key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.nystrom.call import Call, Saved

NEG_INF = float("-inf")
CHUNK = 16


def forward(call: Call) -> Saved:
    """Outputs of a call."""
    given = _Given(call)
    if call.cu_seqlens is None:
        return given.run(slice(0, call.query.shape[2]), slice(None))
    bounds = call.cu_seqlens.tolist()
    parts = [
        given.run(slice(start, stop), slice(s, s + 1))
        for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    outs, L, R = zip(*parts, strict=True)
    return Saved(torch.cat(outs, 2), torch.cat(L), torch.cat(R))


class _Given:
    """A call in computing precision."""

    def __init__(self, call: Call):
        self.call, dtype = call, torch.promote_types(call.query.dtype, torch.float32)
        heads = call.key.shape[1]
        self.query = call.query.to(dtype).unflatten(1, (heads, -1))  # (B, H, group, N, D)
        self.key, self.value = call.key.to(dtype), call.value.to(dtype)
        lq, lk, core = (
            x.to(dtype) if x.dim() == 4 else x.to(dtype).unsqueeze(0)
            for x in (call.landmark_queries, call.landmark_keys, call.core)
        )
        self.core = core.unsqueeze(2)  # (B | 1, H, 1, M, M)
        self.half = 0.5 * call.scale * (lq * lk).sum(-1)  # (B | 1, H, M)
        self.lq, self.lk = call.scale * lq, (call.scale * lk).unsqueeze(2)
        self.decay = None if call.decay is None else call.decay.to(dtype).unsqueeze(1)  # (H, 1, M)
        held = call.rows, heads, core.shape[-1]
        if call.L0 is None or call.R0 is None:
            self.L0 = self.key.new_full(held, NEG_INF)
            self.R0 = self.key.new_zeros(*held, call.value.shape[3])
        else:
            self.L0 = call.L0.to(dtype)
            self.R0 = call.R0.to(dtype).masked_fill((call.L0 == NEG_INF).unsqueeze(-1), 0.0)

    def run(self, tokens: slice, rows: slice) -> Saved:
        """Outputs of some tokens, which start from a row of the states."""
        L, R = self.L0[rows], self.R0[rows]
        if not self.call.is_causal:
            keys = tokens if self.call.cu_seqlens is not None else slice(0, self.key.shape[2])
            L, R, out = self.all_at_once(tokens, keys, L, R)
            return Saved(self.of_heads(out), L, R)
        outs = [self.query[..., :0, :1].expand(-1, -1, -1, -1, R.shape[-1])]
        for start in range(tokens.start, tokens.stop, CHUNK):
            L, R, out = self.chunk(slice(start, min(start + CHUNK, tokens.stop)), L, R)
            outs.append(out)
        return Saved(self.of_heads(torch.cat(outs, 3)), L, R)

    def of_heads(self, out: Tensor) -> Tensor:
        return out.flatten(1, 2).to(self.call.query.dtype)

    def visible(self, part: slice) -> tuple[Tensor, Tensor]:
        """Scores (B, H, n, M), -inf where hidden, and values, 0 there."""
        key, value = self.key[:, :, part], self.value[:, :, part]
        if self.call.key_mask is None:
            return key @ self.lq.mT, value
        hidden = ~self.call.key_mask[:, None, part, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        return (key @ self.lq.mT).masked_fill(hidden, NEG_INF), value

    def chunk(self, part: slice, L: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state after a chunk, and its rows (B, H, group, n, Dv)."""
        scores, value = self.visible(part)
        count = scores.shape[2]
        steps = torch.arange(1, count + 1, device=value.device, dtype=value.dtype)[:, None]
        if self.decay is not None:
            scores = scores + self.decay * steps
        later = torch.ones(count, count, dtype=torch.bool, device=value.device).triu(1)
        own = scores.unsqueeze(2).masked_fill(later.unsqueeze(-1), NEG_INF)
        own = own.expand(-1, -1, count, -1, -1)  # (B, H, i, j, M)
        before = L[:, :, None, None].expand(*own.shape[:3], 1, own.shape[4])
        D, total = _softmax(torch.cat([before, own], 3), 3)
        if self.decay is not None:
            total = total - self.decay * steps
        W = self.reading(self.query[:, :, :, part], total.unsqueeze(2))
        inside = torch.einsum("bhgil,bhijl->bhgij", W, D[:, :, :, 1:])
        out = inside @ value.unsqueeze(2) + (W * D[:, :, None, :, 0]) @ R.unsqueeze(2)
        last = D[:, :, -1]
        R = last[:, :, 0].unsqueeze(-1) * R + last[:, :, 1:].mT @ value
        return total[:, :, -1], R, out

    def all_at_once(self, queries: slice, keys: slice, L: Tensor, R: Tensor):
        scores, value = self.visible(keys)
        D, total = _softmax(torch.cat([L.unsqueeze(2), scores], 2), 2)
        R = D[:, :, 0].unsqueeze(-1) * R + D[:, :, 1:].mT @ value
        W = self.reading(self.query[:, :, :, queries], total[:, :, None, None])
        return total, R, W @ R.unsqueeze(2)

    def reading(self, query: Tensor, L: Tensor) -> Tensor:
        """Weights of queries (B, H, group, n, D) on the landmarks' summaries."""
        scores = query @ self.lk.mT
        if not self.call.mass:
            return torch.softmax(scores, -1) @ self.core
        half = self.half[:, :, None, None]
        F = torch.softmax(scores - half, -1)  # a factor of the row cancels
        held, _ = _softmax(L - half, -1)
        G = (F @ self.core) * held
        nothing = (L == NEG_INF).all(-1, keepdim=True)
        return G / G.sum(-1, keepdim=True).masked_fill(nothing, 1.0)


def _softmax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp; 0 and -inf where everything is -inf."""
    top = x.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)
    shares = torch.exp(x - top)
    total = shares.sum(dim, keepdim=True)
    nothing = total == 0.0
    total = total.masked_fill(nothing, 1.0)
    return shares / total, (top + torch.log(total)).masked_fill(nothing, NEG_INF).squeeze(dim)
