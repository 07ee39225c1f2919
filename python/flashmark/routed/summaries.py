"""Summaries of key blocks, by which a router scores them, and the state that holds them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.routed.places import Blocks


class RoutedState(NamedTuple):
    """Summaries of the finished key blocks; what a longer call need not compute again.

    Both tensors are float32 (float64 for float64 inputs) and carry no gradient. Keys and values
    stay with the caller, who passes all of them at each call.
    """

    keys: Tensor  # (B, Hkv, C, M, D): mean key under each landmark; M is 1 without landmarks
    log_counts: Tensor  # (B, Hkv, C, M): log of how many keys; -inf where none

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        landmarks: int,
        head_dim: int,
        *,
        blocks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RoutedState:
        """A state of `blocks` blocks without keys; `landmarks` is 1 for the mean of each block."""
        shape = batch, kv_heads, blocks, landmarks
        logs = torch.full(shape, -math.inf, dtype=dtype, device=device)
        return cls(torch.zeros(*shape, head_dim, dtype=dtype, device=device), logs)

    def merge(self, right: RoutedState) -> RoutedState:
        """The state after `self`'s blocks and then `right`'s, which began at a block's start."""
        return RoutedState(*(torch.cat(pair, 2) for pair in zip(self, right, strict=True)))


torch.serialization.add_safe_globals([RoutedState])  # for torch.load, weights_only=True


def summarize(
    key: Tensor, landmarks: Tensor | None, scale: float, keep: Tensor | None, blocks: Blocks
) -> RoutedState:
    """Summaries of blocks, differentiable.

    a_jl = softmax_l(scale k_j . x_l), n_l = sum_j a_jl, K_l = sum_j a_jl k_j / n_l

    Args:
        key: (B, Hkv, Nk, D).
        landmarks: (Hkv, M, D) or (B, Hkv, M, D); None: the mean key alone.
        keep: bool (B, Nk), which keys take part; the others may hold anything.
    """
    inside = blocks.inside[None, None]  # (1, 1, C, s)
    if keep is not None:
        inside = inside & keep[:, None, blocks.tokens]
    return _summary(key[:, :, blocks.tokens], inside, landmarks, scale)


def update_summaries(
    state: RoutedState, key: Tensor, landmarks: Tensor | None, scale: float, begin: Tensor,
    end: Tensor, most: int, block_size: int,
) -> None:  # fmt: skip
    """Write the summaries of the blocks in which tokens from `begin` on were added into `state`.

    Blocks are summarised from all of their keys so far, which gives what one pass gives. Nothing
    waits for the device.

    Args:
        state: of all blocks that fit into `key`.
        key: (B, Hkv, C * block_size, D), which holds `end` keys a sample.
        begin, end: integers (B,).
        most: bound of end - begin.
    """
    blocks, device = state.keys.shape[2], key.device
    count = min((most + block_size - 2) // block_size + 1, blocks) if most else 0
    if not count:
        return
    number = torch.div(begin, block_size, rounding_mode="floor").long()[:, None]
    number = number + torch.arange(count, device=device)  # (B, T)
    new = number * block_size < end[:, None]
    tokens = number[..., None] * block_size + torch.arange(block_size, device=device)
    inside = tokens < end[:, None, None]  # (B, T, s)
    tokens = tokens.clamp(max=max(0, key.shape[2] - 1)).flatten(1)
    found = key.gather(2, tokens[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3]))
    fresh = _summary(found.unflatten(2, (count, block_size)), inside[:, None], landmarks, scale)
    # numbers that run over the end come back at the start, where they write what was there
    row = number % blocks
    for held, x in zip(state, fresh, strict=True):
        shape = row.shape[0], 1, count, *(1 for _ in held.shape[3:])
        at = row.view(shape).expand_as(x)
        held.scatter_(2, at, torch.where(new.view(shape), x, held.gather(2, at)))


def _summary(
    keys: Tensor, inside: Tensor, landmarks: Tensor | None, scale: float
) -> RoutedState:  # fmt: skip
    """Summaries of keys (B, Hkv, C, s, D), of which those `inside` (B | 1, 1, C, s) take part."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    wide = keys.dtype
    keys = keys.masked_fill(~inside[..., None], 0.0)
    if landmarks is None:
        shares = inside[..., None].to(wide)
    else:
        x = landmarks.to(wide)[..., None, :, :]  # (B?, Hkv, 1, M, D)
        shares = torch.softmax(scale * keys @ x.mT, -1).masked_fill(~inside[..., None], 0.0)
    counts = shares.sum(3)  # (B, Hkv, C, M)
    means = shares.mT @ keys / counts.masked_fill(counts == 0.0, 1.0)[..., None]
    counts = counts.expand(means.shape[:-1])
    return RoutedState(means, counts.masked_fill(counts == 0.0, 0.0).log())


def scores_of(query: Tensor, state: RoutedState, scale: float) -> Tensor:
    """Scores (B, Hkv, G, n, C) of query rows (B, Hq, n, D), differentiable: the log of the mass
    that each head sees in each block, as the summaries tell it.

    r_gic = log sum_l n_cl exp(scale q_gi . K_cl)
    """
    keys, logs = state
    grouped = query.unflatten(1, (keys.shape[1], -1)).to(keys.dtype)  # (B, Hkv, G, n, D)
    blocks, marks = keys.shape[2:4]
    each = scale * grouped.flatten(2, 3) @ keys.flatten(2, 3).mT  # (B, Hkv, G n, C M)
    each = each.unflatten(3, (blocks, marks)) + logs[:, :, None]
    return log_total(each, (4,)).unflatten(2, grouped.shape[2:4])


def mean_over_heads(each: Tensor, far: Tensor) -> Tensor:
    """Log of the mean over heads of their probabilities, softmax over the blocks of scores `each`
    (B, Hkv, G, n, C); -inf where a block is not `far`, (B | 1, 1, n, C), and where a score is NaN.

    (B, Hkv, n, C), differentiable. A score of +inf counts as the largest number there is.
    """
    none = ~far | each.isnan().any(2)  # (B, Hkv, n, C)
    each = each.clamp(max=torch.finfo(each.dtype).max).masked_fill(none[:, :, None], -math.inf)
    total = log_total(each, (4,))
    each = each - total.masked_fill(total == -math.inf, 0.0)[..., None]
    return log_total(each, (2,)) - math.log(max(1, each.shape[2]))


def log_total(each: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`torch.logsumexp`, without a gradient of NaN where all are -inf, as for a block without keys.

    +inf and NaN pass. The total of nothing is -inf.
    """
    if any(each.shape[d] == 0 for d in dims):
        return each.sum(dims) - math.inf
    top = each.detach().amax(dims, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    total = (each - top).exp().sum(dims)
    none = total == 0.0
    return (total.masked_fill(none, 1.0).log() + top.squeeze(dims)).masked_fill(none, -math.inf)
