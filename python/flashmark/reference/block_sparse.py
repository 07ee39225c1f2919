"""The definition of block-sparse attention, densely, and of its dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask=None,
    *,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys, as `flashmark.block_sparse_attention`, computed
    densely.

    `mask` may be None, a mask expression, a compiled BlockMask, or a bool tensor broadcastable to
    (B, Hq, Nq, Nk). All computation is in the dtype of `query`.
    """
    (batch, heads, q_len, dim), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    dtype, device = query.dtype, query.device
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    value = value.repeat_interleave(heads // kv_heads, dim=1)
    if kv_lengths is not None:
        beyond = torch.arange(kv_len, device=device) >= kv_lengths.view(-1, 1, 1, 1)
        key, value = (x.masked_fill(beyond.mT, 0.0) for x in (key, value))  # may hold anything
    rows = torch.arange(q_len, device=device).expand(batch, q_len)  # row of the mask, per query
    mask_rows = q_len
    if query_offset is not None:
        rows = rows + torch.as_tensor(query_offset, device=device).reshape(-1, 1)
        mask_rows = mask.q_len if hasattr(mask, "q_len") else kv_len

    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and bias.dim() == 2:  # Toeplitz: entry j - i + mask_rows - 1
        entry = torch.arange(kv_len, device=device) - rows.unsqueeze(-1) + mask_rows - 1
        scores = scores + bias.to(dtype)[:, entry].transpose(0, 1)
    elif bias is not None:
        scores = scores + bias.to(dtype)

    visible = _visible(mask, batch, heads, mask_rows, kv_len, device)
    visible = visible.expand(batch, heads, -1, -1).gather(
        2, rows[:, None, :, None].expand(batch, heads, q_len, kv_len).long()
    )
    if kv_lengths is not None:
        visible = visible & ~beyond
    scores = scores.masked_fill(~visible, NEG_INF)

    logits = scores
    if sinks is not None:
        column = sinks.to(dtype).view(1, heads, 1, 1).expand(batch, heads, q_len, 1)
        logits = torch.cat([scores, column], dim=-1)
    empty = (logits == NEG_INF).all(-1, keepdim=True)  # no key and no sink: output 0, lse -inf
    # not by exp(scores - lse): beside a bias of -1e9 the logarithm of the sum is lost in lse
    none = logits.new_full((*logits.shape[:3], 1), NEG_INF)  # so that there is one, without a key
    top = torch.cat([logits.detach(), none], -1).amax(-1, keepdim=True).masked_fill(empty, 0.0)
    shares = torch.exp(logits - top)
    total = shares.sum(-1, keepdim=True)
    weights = shares[..., :kv_len] / total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, NEG_INF)
    if dropout_p > 0.0:
        keep = dropout_keep(dropout_seed, dropout_p, batch, heads, q_len, kv_len, device)
        weights = weights * keep / (1.0 - dropout_p)
    out = weights @ value
    lse = lse.squeeze(-1).to(torch.promote_types(dtype, torch.float32))
    return (out, lse) if return_lse else out


def _visible(mask, batch, heads, q_len, kv_len, device) -> Tensor:
    if mask is None:
        return torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor):
        return mask.expand(-1, -1, q_len, kv_len)
    if hasattr(mask, "tile_bits"):
        return mask.to_dense().to(device)
    return mask.to_dense(batch, heads, q_len, kv_len, device=device)


def dropout_keep(seed, p: float, batch: int, heads: int, q_len: int, kv_len: int, device="cpu"):
    """Dropout's keep mask, bool (batch, heads, q_len, kv_len).

    (b, h, i, j) is kept iff word j % 4 of philox4x32-10(seed, (j // 4, i, b * heads + h, 0)) >=
    floor(p * 2^32).
    """
    seed = int(seed)
    j, i, bh = (torch.arange(n, device=device) for n in (-(-kv_len // 4), q_len, batch * heads))
    counter = torch.broadcast_tensors(j, i[:, None], bh[:, None, None], torch.zeros_like(j))
    words = torch.stack(philox4x32((seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), counter), dim=-1)
    keep = words.flatten(-2)[..., :kv_len] >= int(p * 2**32)
    return keep.view(batch, heads, q_len, kv_len)


def philox4x32(key: tuple[int, int], counter, rounds: int = 10):
    """The counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011).

    `counter`: four int64 tensors holding 32-bit words; returns four such tensors.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = (
            c0 * 0xD2511F53,
            c2 * 0xCD9E8D57,
        )  # 64-bit products: int64 wraps, the bits are right
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
