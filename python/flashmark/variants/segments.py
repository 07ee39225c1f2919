"""Helpers shared by the variants: means over segments, and masks between segments."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.masks import Mask, causal
from flashmark.masks.expression import Not, classify


def segment_means(
    x: Tensor, segments: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Means of x (B, H, N, D) over consecutive segments, and how many tokens each holds.

    N >= segments; the last N % segments of them are one token longer. Tokens whose `key_mask`
    (B, N) is False do not take part, whatever they hold; a segment without a token has the mean 0.

    Returns:
        means (B, H, segments, D), at least float32; sizes (B or 1, 1, segments) of that dtype.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    taking_part = x.new_ones(1, 1, x.shape[2], 1)
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, :, None], 0.0)
        taking_part = key_mask[:, None, :, None].to(x.dtype)
    sizes = _segment_sums(taking_part, segments)
    return _segment_sums(x, segments) / sizes.clamp_min(1.0), sizes.squeeze(-1)


def _segment_sums(x: Tensor, segments: int) -> Tensor:
    length = x.shape[2]
    size, longer = length // segments, length % segments  # divmod knows no symbolic lengths
    cut = (segments - longer) * size
    sums = x[:, :, :cut].unflatten(2, (segments - longer, size)).sum(3)
    if not longer:
        return sums
    return torch.cat([sums, x[:, :, cut:].unflatten(2, (longer, size + 1)).sum(3)], dim=2)


def group_mean(query: Tensor, kv_heads: int) -> Tensor:
    """The mean of the query heads that share a key head, (B, Hkv, N, D), at least float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.unflatten(1, (kv_heads, -1)).mean(2, dtype=wide)


class _Lagged(Mask):
    """kv // kv_step + lag <= q // q_step, on raw indices: a staircase."""

    def __init__(self, q_step: int, kv_step: int, lag: int):
        self.steps = q_step, kv_step, lag
        self.formula = (_Lagged, *self.steps)

    def tiles(self, grid, b, h, q_block, kv_block):
        q_step, kv_step, lag = self.steps
        q_first = q_block * grid.block_q
        q_last = (q_first + grid.block_q - 1).clamp(max=grid.q_len - 1)
        kv_first, kv_last = grid.keys(kv_block)
        return classify(
            kv_last // kv_step + lag <= q_first // q_step,
            kv_first // kv_step + lag > q_last // q_step,
        )

    def key(self, grid, b, h, q_block, kv_block):
        q_step, kv_step, _ = self.steps
        q, kv = q_block * grid.block_q, kv_block * grid.block_kv
        phase = (q % q_step) * kv_step + kv % kv_step
        return {("lagged", self.steps): (q // q_step - kv // kv_step) * q_step * kv_step + phase}

    def elements(self, grid, b, h, i, j):
        q_step, kv_step, lag = self.steps
        return j // kv_step + lag <= i // q_step

    def __repr__(self):
        return "lagged({}, {}, {})".format(*self.steps)


class SegmentMasks(NamedTuple):
    """Masks between tokens and segments of one size."""

    own: Mask  # token j is of the same segment as token i, and j <= i
    finished: Mask  # segment l is over before the segment of token i begins
    so_far: Mask  # token j is not after the end of segment l


def segment_masks(size: int) -> SegmentMasks:
    """The masks of segments of `size` tokens, compiled once for their sizes as formulas are."""
    size = operator.index(size)  # a symbol under torch.compile
    return SegmentMasks(
        own=causal() & Not(_Lagged(size, size, 1)),  # torch.compile knows no ~ of ours
        finished=_Lagged(size, 1, 1),
        so_far=_Lagged(1, size, 0),
    )
