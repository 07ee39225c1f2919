"""Layouts of hybrid attention: the places of a call's tokens in the chunks of their streams.

A chunk is `window` tokens, counted from the start of the stream. Two layouts have the same
interface: the keys of the near field, the chunks of keys that far queries read, and the chunks of
queries that read them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


class FromStart:
    """A call without a past: chunk c starts at token c * window; chunks from 2 on read far keys."""

    first = 2
    query_offset = None

    def __init__(self, window: int, tokens: int):
        self.window, self.tokens = window, tokens
        self.chunks = max(0, -(-tokens // window) - self.first)
        self.rows = tokens  # of the near field's mask

    def keys(self, x: Tensor) -> Tensor:
        """The chunks that are read, (B, H, chunks, window, *) of (B, H, N, *)."""
        read = x[:, :, : self.chunks * self.window]
        return read.unflatten(2, (self.chunks, self.window))

    def queries(self, x: Tensor) -> Tensor:
        """The chunks that read, in the same shape; beyond the end 0."""
        reading = x[:, :, self.first * self.window :]
        missing = self.chunks * self.window - reading.shape[2]
        reading = pad(reading, (0, 0, 0, missing)) if missing else reading
        return reading.unflatten(2, (self.chunks, self.window))

    def joined(self, x: Tensor) -> Tensor:
        """(B, H, N, *), the inverse of `queries`; 0 for chunks that read nothing."""
        ahead = self.first * self.window
        return pad(x.flatten(2, 3)[:, :, : self.tokens - ahead], (0, 0, ahead, 0))


class Resumed:
    """A call that goes on with streams at `position` (B,): chunk 0 is the one before theirs.

    Every chunk from 1 on reads the far field. A call shorter than a chunk touches at most two: each
    then holds all its tokens, most of them hidden, which is less work than two whole chunks.
    """

    first = 1

    def __init__(self, window: int, tokens: int, position: Tensor):
        self.window, self.tokens = window, tokens
        self.chunks = -(-(window - 1 + tokens) // window)
        self.rows = (self.chunks + self.first) * window
        inside = position.unsqueeze(1) % window  # tokens of the current chunk so far
        steps = torch.arange(tokens, device=position.device)
        self.query_offset = (window + inside).flatten().int()
        self._inside = inside
        self._place = torch.arange(self.rows, device=position.device)
        held = self._place < window + inside
        self._near = torch.where(held, self._place, self._place + window - inside)
        self._near.clamp_(max=2 * window + tokens - 1)
        self._there = self._place < window + inside + tokens
        if tokens < window:
            chunk = torch.arange(self.chunks, device=position.device).unsqueeze(1)
            self.own = (inside.unsqueeze(1) + steps) // window == chunk
            self._split = steps.repeat(self.chunks).expand(inside.shape[0], -1)
            self._join = (inside + steps) // window * tokens + steps
        else:
            token = self._place[: self.chunks * window] - inside
            self.own = ((token >= 0) & (token < tokens)).unflatten(1, (self.chunks, window))
            self._split = token.clamp(0, tokens - 1)
            self._join = inside + steps

    def near(self, held: Tensor, x: Tensor) -> Tensor:
        """(B, H, rows, *): what is held of the past, then the tokens, on the grid of chunks."""
        return taken(torch.cat([held, x], 2), self._near)

    def near_mask(self, held: Tensor, keep: Tensor | None) -> Tensor:
        """bool (B, rows): which of them take part."""
        if keep is None:
            keep = held.new_ones(held.shape[0], self.tokens)
        return torch.cat([held, keep], 1).gather(1, self._near) & self._there

    def keys(self, x: Tensor) -> Tensor:
        return taken(x, self._split).unflatten(2, (self.chunks, self.own.shape[2]))

    queries = keys

    def joined(self, x: Tensor) -> Tensor:
        return taken(x.flatten(2, 3), self._join)

    def entered(self, lengths: int | Tensor) -> Tensor:
        """(B,) chunks entered after `lengths` tokens."""
        return (self._inside.squeeze(1) + lengths) // self.window

    def last(self, x: Tensor, entered: Tensor) -> Tensor:
        """Rows of `near` for the last chunk and the one before it, (B, H, 2 window, *)."""
        start = entered.unsqueeze(1) * self.window
        index = start + torch.arange(2 * self.window, device=start.device)
        return taken(x, index.clamp(max=self.rows - 1))


def taken(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, n, *): rows `index` (B, n) of x (B, H, m, *), the same for all heads."""
    batch, heads, length, width = x.shape
    line = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    flat = (line + index.unsqueeze(1)).flatten()
    return x.reshape(-1, width).index_select(0, flat).view(batch, heads, index.shape[1], width)


class PackedRows:
    """Packed sequences spread over rows of the longest length, and back."""

    def __init__(self, cu_seqlens: Tensor, tokens: int):
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "cu_seqlens: expected None under torch.export, where the longest sequence is not "
                "known, got a tensor (a hybrid module makes one of key_mask); hybrid attention "
                "takes it on a CPU where the C++ kernels run"
            )
        bounds = cu_seqlens.long()
        self.lengths = bounds[1:] - bounds[:-1]
        longest = int(self.lengths.max())
        step = torch.arange(longest, device=bounds.device)
        self.there = step < self.lengths.unsqueeze(1)  # (S, longest)
        self.token = (bounds[:-1, None] + step).clamp(max=max(0, tokens - 1))
        every = torch.arange(tokens, device=bounds.device)
        row = torch.searchsorted(bounds[1:], every, right=True)
        self.place = row * longest + every - bounds[row]

    def rows_of(self, x: Tensor) -> Tensor:
        """(1, H, N, *) -> (S, H, longest, *); 0 beyond the end of a sequence."""
        rows = x[0].index_select(1, self.token.flatten()).unflatten(1, self.token.shape)
        return rows.transpose(0, 1).masked_fill(~self.there[:, None, :, None], 0.0)

    def mask_of(self, key_mask: Tensor | None) -> Tensor:
        return self.there if key_mask is None else self.there & key_mask[0][self.token]

    def packed(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2).index_select(1, self.place).unsqueeze(0)
