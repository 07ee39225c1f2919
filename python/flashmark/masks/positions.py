"""Masks of positions and lengths. Query i sits at p = i + (kv_len - q_len) among the keys."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from flashmark.masks.arguments import NO_BOUND, check_batch, integer, integer_tensor
from flashmark.masks.expression import PARTIAL, Mask, Or, classify


class Band(Mask):
    """low < j - p <= high, either side open when None: causal, windows and the diagonal."""

    def __init__(self, low: int | None, high: int | None):
        self.low, self.high = low, high
        self.formula = (Band, low, high)

    def tiles(self, grid, b, h, q_block, kv_block):
        p_first, p_last = grid.positions(q_block)
        j_first, j_last = grid.keys(kv_block)
        nearest, farthest = j_last - p_first, j_first - p_last  # extremes of j - p over the tile
        full = torch.ones_like(nearest, dtype=torch.bool)
        empty = ~full
        if self.low is not None:
            full, empty = full & (farthest > self.low), nearest <= self.low
        if self.high is not None:
            full, empty = full & (nearest <= self.high), empty | (farthest > self.high)
        return classify(full, empty)

    def key(self, grid, b, h, q_block, kv_block):
        classes = self.tiles(grid, b, h, q_block, kv_block).long()
        delta = grid.delta(q_block, kv_block)
        return {("band", self.low, self.high): delta.where(classes == PARTIAL, classes - NO_BOUND)}

    def elements(self, grid, b, h, i, j):
        p = i + grid.offset
        if self.low is None and self.high is None:
            return torch.ones_like(p * j, dtype=torch.bool)
        if self.low is None:
            return j <= p + self.high
        if self.high is None:
            return j > p + self.low
        return (j > p + self.low) & (j <= p + self.high)

    def __repr__(self):
        match self.low, self.high:
            case None, 0:
                return "causal()"
            case -1, 0:
                return "diagonal()"
            case low, None:
                return f"sliding_window({-1 if low is None else -low})"
            case low, high:
                return f"sliding_window({-1 if low is None else -low}, {high})"


def causal() -> Mask:
    """j <= p: a query sees its own position and all before it, aligned to the bottom right."""
    return Band(None, 0)


def sliding_window(left: int, right: int | None = None) -> Mask:
    """p - left < j, so `left` counts oneself; and j <= p + right when `right` is given.

    -1 is no bound on that side. Alone it does not hide the future unless `right=0`: write
    `causal() & sliding_window(512)`.
    """
    low = None if _no_bound(left) else -integer("left", left, 1)
    high = None if right is None or _no_bound(right) else integer("right", right, 0)
    return Band(low, high)


def _no_bound(size: int) -> bool:
    return isinstance(size, numbers.Integral) and not isinstance(size, bool) and size == -1


def diagonal() -> Mask:
    """j == p: only oneself."""
    return Band(-1, 0)


class Dilated(Mask):
    def __init__(self, stride: int):
        self.stride = stride
        self.formula = (Dilated, stride)

    def tiles(self, grid, b, h, q_block, kv_block):
        p_first, p_last = grid.positions(q_block)
        j_first, j_last = grid.keys(kv_block)
        low, high = p_first - j_last, p_last - j_first
        multiples = high.div(self.stride, rounding_mode="floor") - (low - 1).div(
            self.stride, rounding_mode="floor"
        )
        return classify(multiples == high - low + 1, multiples == 0)

    def key(self, grid, b, h, q_block, kv_block):
        return {("dilated", self.stride): grid.delta(q_block, kv_block) % self.stride}

    def elements(self, grid, b, h, i, j):
        return (i + grid.offset - j) % self.stride == 0

    def __repr__(self):
        return f"dilated({self.stride})"


def dilated(stride: int) -> Mask:
    """(p - j) % stride == 0: every stride-th key, past and future, counted from oneself."""
    return Dilated(integer("stride", stride, 1))


class LocalChunks(Mask):
    """Keys of the query's own chunk and of the one before it, up to itself.

    With `slots`, the first keys are not tokens: chunk c sees `slots` of them from
    (c - first) * slots on, and `lead` of them (at least as many) come before key 0.
    """

    def __init__(self, window: int, slots: int = 0, first: int = 0, lead: int = 0):
        self.window, self.slots, self.first, self.lead = window, slots, first, lead
        self.formula = (LocalChunks, window, slots, first, lead)

    def tiles(self, grid, b, h, q_block, kv_block):
        (p_first, p_last), (j_first, j_last) = self._positions(grid, q_block, kv_block)
        c_first, c_last = self._chunk(p_first), self._chunk(p_last)
        n_first = j_first.clamp(min=0)
        full = (j_last <= p_first) & (c_last - self._chunk(n_first) <= 1)
        empty = (n_first > p_last) | (c_first - self._chunk(j_last) > 1)
        if self.slots:
            near, far = j_last >= 0, j_first < 0
            s_first = self._owner(j_first)
            s_last = self._owner(j_last.clamp(max=-1))
            only_own = (c_first == c_last) & (s_first == c_first) & (s_last == c_first)
            full = (full | ~near) & (only_own | ~far)
            empty = (empty | ~near) & ((s_first > c_last) | (s_last < c_first) | ~far)
        return classify(full, empty)

    def key(self, grid, b, h, q_block, kv_block):
        (p_first, _), (j_first, j_last) = self._positions(grid, q_block, kv_block)
        near, far = j_last >= 0, j_first < 0
        first_slot = (j_first + self.lead) - self._chunk(p_first) * self.slots
        return {
            ("phase", self.window): p_first % self.window,
            ("chunk", self.window): (j_first - p_first).where(near, 1),
            ("slots", self.slots): first_slot.where(far, 1 << 40),
            ("lead", self.lead): j_first.clamp(max=0).where(near & far, 0),
        }

    def elements(self, grid, b, h, i, j):
        p, j = i + (grid.offset - self.lead), j - self.lead
        age = self._chunk(p) - self._chunk(j)
        near = (j <= p) & (age <= 1)
        if not self.slots:
            return near
        return torch.where(j < 0, self._owner(j) == self._chunk(p), near)

    def _positions(self, grid, q_block, kv_block):
        """First and last token of queries and of keys; slots are keys below 0."""
        p_first, p_last = grid.positions(q_block)
        j_first, j_last = grid.keys(kv_block)
        lead = self.lead
        return (p_first - lead, p_last - lead), (j_first - lead, j_last - lead)

    def _chunk(self, position: Tensor) -> Tensor:
        return position.div(self.window, rounding_mode="floor")

    def _owner(self, j: Tensor) -> Tensor:
        """The chunk that sees slot j."""
        return (j + self.lead).div(self.slots, rounding_mode="floor") + self.first

    def __repr__(self):
        slots = f", slots={self.slots}" if self.slots else ""
        return f"local_chunks({self.window}{slots})"


def local_chunks(window: int) -> Mask:
    """j <= p and p // window - j // window <= 1: one's own chunk so far and the one before it.

    Unlike `sliding_window`, how far a query sees depends on its place in its chunk.
    """
    return LocalChunks(integer("window", window, 1))


class Prefix(Mask):
    """j < length, an int or a tensor (B | 1,)."""

    def __init__(self, length: int | Tensor, name: str = "prefix"):
        self.length, self.name = length, name
        if isinstance(length, int):
            self.formula = (Prefix, length, name)

    def dims(self, batch, heads):
        if isinstance(self.length, int):
            return 1, 1
        check_batch(f"{self.name} length", self.length.shape[0], batch)
        return self.length.shape[0], 1

    def _at(self, b):
        if isinstance(self.length, int):
            return self.length
        return self.length[shared(b, self.length.shape[0])].long().clamp(min=0)

    def tiles(self, grid, b, h, q_block, kv_block):
        j_first, j_last = grid.keys(kv_block)
        n = self._at(b)
        return classify(j_last < n, j_first >= n)

    def key(self, grid, b, h, q_block, kv_block):
        inside = (self._at(b) - grid.keys(kv_block)[0]).clamp(0, grid.block_kv)
        return {(self.name, id(self)): inside}

    def elements(self, grid, b, h, i, j):
        return j < self._at(b)

    def tensors(self):
        return () if isinstance(self.length, int) else (self.length,)

    def mapped(self, function):
        return self if isinstance(self.length, int) else Prefix(function(self.length), self.name)

    def __repr__(self):
        n = self.length if isinstance(self.length, int) else f"<{self.length.shape[0]} lengths>"
        return f"{self.name}({n})"


def shared(index: Tensor, size: int) -> Tensor:
    """An index into a dimension of `size`; 1 is shared by all samples or heads."""
    return index if size > 1 else torch.zeros_like(index)


def prefix(n: int | Tensor) -> Mask:
    """j < n, with n an int or an integer tensor (B,) or (1,): one per sample, or one for all."""
    if isinstance(n, Tensor):
        return Prefix(integer_tensor("n", n, (1,)))
    return Prefix(integer("n", n, 0))


def pinned(n: int | Tensor) -> Mask:
    """prefix(n) | diagonal(): the first n keys and oneself, for parallel decoding."""
    return Or(prefix(n), diagonal())


def plain_kind(mask: Mask) -> str | None:
    """The `kind` of a mask that comparison alone decides."""
    formula = mask.formula
    if formula is None or formula[0] is not Band or formula[1] is not None:
        return None
    high = formula[2]
    if high is None:
        return "dense"
    return "causal" if high == 0 else None


def is_plain_causal(mask: Mask) -> bool:
    return plain_kind(mask) == "causal"
