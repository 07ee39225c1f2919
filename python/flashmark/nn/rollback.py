"""The newest tokens of a linear attention's cache, kept so that they can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from flashmark.nn.tokens import Packing

# (state, key, value, counts) -> the state after the first `counts` of these tokens
Consume = Callable[[Any, Tensor, Tensor, Tensor], Any]


class Rollback:
    """A state `tokens` or more tokens back, and the keys and values of all tokens since.

    A state cannot forget a token. To take tokens back it is computed again from the older state and
    the kept keys and values, which is exact but for rounding. Between `tokens` and 2 `tokens` are
    kept; beyond that the oldest ones move into the older state, so each token passes the attention
    operator twice, and a crop passes at most 2 `tokens` through it once more.

    Attributes:
        tokens: how many can be taken back at least.
        state, length: the older state and how many tokens it has consumed, int32 (B,).
        counts: int32 (B,), tokens kept since, in the first columns of `key` and `value`.
        key, value: (B, Hkv, n, D), n <= 2 `tokens`; None before the first call.
        stale: the cache's state is to be computed again before it is read.
    """

    def __init__(self, tokens: int, state: Any, length: Tensor):
        self.tokens, self.state, self.length = tokens, cloned(state), length.clone()
        self.counts = torch.zeros_like(length)
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.stale = False

    def record(self, key: Tensor, value: Tensor, mask: Tensor | None, consume: Consume) -> None:
        """Add a call's tokens, (B, Hkv, N, D); `mask` bool (B, N) leaves some out."""
        batch, new = key.shape[0], key.shape[2]
        if mask is None:
            mask = torch.ones(batch, new, dtype=torch.bool, device=key.device)
        if self.key is not None and self.value is not None:
            key = torch.cat([self.key, key.to(self.key.dtype)], 2)
            value = torch.cat([self.value, value.to(self.value.dtype)], 2)
            columns = torch.arange(self.key.shape[2], device=key.device)
            mask = torch.cat([columns < self.counts[:, None], mask], 1)
        packing = Packing.of(mask)
        key, value = (take(x, packing.order) for x in (key, value))
        counts = packing.counts
        if key.shape[2] > 2 * self.tokens:
            older = (counts - self.tokens).clamp_min(0)
            self.state = consume(self.state, key, value, older)
            self.length = self.length + older
            columns = torch.arange(self.tokens, device=key.device) + older[:, None]
            key, value = (take(x, columns.clamp_max(x.shape[2] - 1)) for x in (key, value))
            counts = counts - older
        self.key, self.value, self.counts = key, value, counts

    def crop(self, length: Tensor) -> None:
        """Keep tokens up to `length` (B,)."""
        self.counts = (length - self.length).to(self.counts.dtype)
        self.stale = True

    def restored(self, consume: Consume) -> Any:
        """The state after the tokens that were kept."""
        self.stale = False
        state = cloned(self.state)
        if self.key is None or self.value is None:
            return state
        return consume(state, self.key, self.value, self.counts)

    def select(self, index: Tensor) -> None:
        self.state = selected(self.state, index)
        self.length, self.counts = self.length[index], self.counts[index]
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[index], self.value[index]


def take(x: Tensor, columns: Tensor) -> Tensor:
    """Tokens `columns` (B, n) of x (B, H, N, D)."""
    index = columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def cloned(state: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)


def selected(state: Any, index: Tensor) -> Any:
    """Samples `index` of a state whose tensors all lead with the batch."""
    return pytree.tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, state)
