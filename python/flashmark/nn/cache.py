"""Caches of the attention modules between calls, updated in place by `forward`."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashmark.arguments import check_count
from flashmark.masks import BlockMask
from flashmark.masks.block_mask import TileLists
from flashmark.nn.rollback import Consume, Rollback, selected
from flashmark.nystrom import NystromState

if TYPE_CHECKING:
    from flashmark.hybrid.state import HybridState


class KeyValueCache:
    """Keys and values of every token so far, in tensors that are allocated once.

    Attributes:
        length: int32 (B,), tokens held by each sample. Masked tokens are not held.
        max_length: tokens that fit.
        mask: which of them a query sees, compiled once for all of the cache; None: every one.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        mask: BlockMask | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.max_length, self.mask = max_length, mask
        self.length = torch.zeros(batch, dtype=torch.int32, device=device)
        # Row 0 takes what masked tokens write, so that writing needs no branch and no wait.
        shape = batch, kv_heads, max_length + 1, head_dim
        self._key = torch.zeros(shape, dtype=dtype, device=device)
        self._value = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def key(self) -> Tensor:
        """(B, Hkv, max_length, D); rows from `length` on are no keys."""
        return self._key[:, :, 1:]

    @property
    def value(self) -> Tensor:
        """(B, Hkv, max_length, D)"""
        return self._value[:, :, 1:]

    def first_column(self, tokens: int) -> Tensor:
        """First column of each sample's new tokens in a call of `tokens` columns, int32 (B,).

        0 where all columns fit into the cache. A sample near its end that brings few tokens has
        them moved to the right, so that no column lies beyond the cache.
        """
        return (self.length + (tokens - self.max_length)).clamp(min=0)

    def append(self, key: Tensor, value: Tensor, first: Tensor, counts: Tensor | int) -> None:
        """Write `counts` tokens a sample, in columns from `first` on, of (B, Hkv, N, D)."""
        columns = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
        column = columns - first[:, None]
        # an int stays an int: as a tensor it would wait for the device
        counted = counts if isinstance(counts, int) else counts.view(-1, 1)
        new = (column >= 0) & (column < counted)
        rows = torch.where(new, self.length[:, None] + column + 1, 0).long()
        index = rows[:, None, :, None].expand_as(key)
        self._key.scatter_(2, index, key.to(self._key.dtype))
        self._value.scatter_(2, index, value.to(self._value.dtype))
        self.length += counts

    def select(self, index: Tensor) -> None:
        """Keep samples `index` (B',) in this order; one may be repeated (beams)."""
        if self.mask is not None and self.mask.batch > 1:
            raise NotImplementedError("cache: expected a mask that is the same for all samples")
        self.length = self.length[index]
        self._key, self._value = self._key[index], self._value[index]

    def crop(self, length: Tensor | int) -> None:
        """Keep the first `length` tokens, an int or (B,); samples that hold fewer keep them all."""
        self.length = kept_lengths(self.length, length)


class StateCache:
    """The state of a linear attention: its size does not grow with the tokens.

    Attributes:
        length: int32 (B,), tokens consumed by each sample. Masked tokens are not counted.
        state: a NystromState or HybridState; None before the first token of a hybrid.
        core: of the landmarks, computed by the first call and kept: what is trained in the meantime
            reaches only caches that begin afterwards. None where there is none.
    """

    def __init__(self, state: NystromState | HybridState | None, length: Tensor):
        self.state, self.length = state, length
        self.core: Tensor | None = None
        self._rollback: Rollback | None = None

    def allow_rollback(self, tokens: int) -> None:
        """Keep enough from now on for `crop` to take back the newest `tokens` tokens.

        That is a second state and the keys and values of 2 `tokens` tokens; each token then passes
        the attention operator twice.
        """
        self._rollback = Rollback(check_count("tokens", tokens), self.state, self.length)

    def select(self, index: Tensor) -> None:
        """Keep samples `index` (B',) in this order; one may be repeated (beams)."""
        self.state, self.length = selected(self.state, index), self.length[index]
        if self._rollback is not None:
            self._rollback.select(index)

    def crop(self, length: Tensor | int) -> None:
        """Keep the first `length` tokens, an int or (B,); samples that hold fewer keep them all.

        `state` is computed again at the module's next call. ValueError where more tokens are to be
        taken back than `allow_rollback` keeps.
        """
        kept = kept_lengths(self.length, length)
        if torch.equal(kept, self.length):
            return
        if self._rollback is None:
            raise ValueError("cache: expected allow_rollback(tokens) before a crop of a state")
        if bool((kept < self._rollback.length).any()):
            raise ValueError(
                f"length: expected at least {self._rollback.length.tolist()}, since "
                f"{self._rollback.tokens} tokens can be taken back, got {kept.tolist()}"
            )
        self.length = kept
        self._rollback.crop(kept)

    def record(self, key: Tensor, value: Tensor, mask: Tensor | None, consume: Consume) -> None:
        """Called by the module before its tokens change the state; brings a cropped one up to date.

        `key` and `value` are (B, Hkv, N, D), `mask` bool (B, N) of the tokens that take part.
        """
        if self._rollback is None:
            return
        if self._rollback.stale:
            self.state = self._rollback.restored(consume)
        self._rollback.record(key, value, mask, consume)


# torch.load reads them with its default, weights_only=True
torch.serialization.add_safe_globals([KeyValueCache, StateCache, Rollback, BlockMask, TileLists])


def kept_lengths(held: Tensor, length: Tensor | int) -> Tensor:
    """Number of tokens that a cache holds after a crop, like `held` (B,)."""
    if isinstance(length, Tensor):
        if length.dtype.is_floating_point or length.dtype == torch.bool:
            raise TypeError(f"length: expected integers, got {length.dtype}")
        if length.shape not in ((), held.shape):
            raise ValueError(
                f"length: expected an int or shape {tuple(held.shape)}, got {tuple(length.shape)}"
            )
    elif isinstance(length, bool) or not isinstance(length, numbers.Integral):
        raise TypeError(f"length: expected an int or a tensor, got {type(length).__name__}")
    wanted = torch.as_tensor(length, device=held.device, dtype=held.dtype)
    if bool((wanted < 0).any()):
        raise ValueError(f"length: expected numbers >= 0, got {length}")
    return torch.minimum(held, wanted)


def check_cache(cache: Any, kind: type[Any], x: Tensor, key_mask: Tensor | None) -> None:
    """Check a cache's class, its batch and room for the tokens, and that no gradient is asked."""
    if type(cache) is not kind:
        raise TypeError(
            f"cache: expected the {kind.__name__} of this module's init_cache, "
            f"got {type(cache).__name__}"
        )
    batch, tokens = x.shape[:2]
    if cache.length.shape[0] != batch or cache.length.device != x.device:
        raise ValueError(
            f"cache: expected a batch of {batch} on {x.device} like x, "
            f"got {cache.length.shape[0]} on {cache.length.device}"
        )
    if not isinstance(cache, KeyValueCache):
        return
    if tokens > cache.max_length:
        raise ValueError(
            f"x: expected at most {cache.max_length} tokens a call with this cache, got {tokens}"
        )
    # elsewhere this would wait for a GPU or break a graph; the write itself is bounds-checked
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        new = tokens if key_mask is None else key_mask.sum(1)
        needed = int((cache.length + new).max()) if batch else 0
        if needed > cache.max_length:
            raise ValueError(
                f"cache: expected room for {needed} tokens, got max_length {cache.max_length}"
            )
