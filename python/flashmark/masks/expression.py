"""Mask expressions: what a query may see, answered per tile in closed form and per element.

A `Mask` is a formula, not a tensor. It answers three questions, all on broadcastable index tensors:

- `tiles`: is a whole tile EMPTY, FULL or PARTIAL? Cautious: PARTIAL also means "not known".
- `key`: integers that identify the bits of a tile; equal keys promise equal bits.
- `elements`: is one (batch, head, query, key) visible?

`&`, `|` and `~` combine the first by three-valued (Kleene) logic, the second by union, the third by
booleans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmark.masks.arguments import not_a_mask

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Grid:
    """A (q_len, kv_len) mask cut into tiles of (block_q, block_kv)."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    device: torch.device

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys: causal masks are aligned to the bottom right."""
        return self.kv_len - self.q_len

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    def coarser(self, factor: int) -> Grid:
        return dataclasses.replace(
            self, block_q=self.block_q * factor, block_kv=self.block_kv * factor
        )

    def positions(self, q_block: Tensor) -> tuple[Tensor, Tensor]:
        """First and last query position (inclusive) of a query block."""
        first = q_block * self.block_q
        last = (first + (self.block_q - 1)).clamp(max=self.q_len - 1)
        return first + self.offset, last + self.offset

    def keys(self, kv_block: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key (inclusive) of a key block."""
        first = kv_block * self.block_kv
        return first, (first + (self.block_kv - 1)).clamp(max=self.kv_len - 1)

    def ragged(self, q_block: Tensor, kv_block: Tensor) -> Tensor:
        """True where a tile reaches beyond q_len or kv_len."""
        over_q = (q_block + 1) * self.block_q > self.q_len
        return over_q | ((kv_block + 1) * self.block_kv > self.kv_len)

    def delta(self, q_block: Tensor, kv_block: Tensor) -> Tensor:
        """From the first query's position to the first key: enough for masks of positions."""
        return kv_block * self.block_kv - q_block * self.block_q - self.offset


class Mask:
    """Base of all mask expressions. Combine with `&`, `|`, `~`; compile with `compile_mask`."""

    #: False when `tiles` and `key` say nothing (the elements must be evaluated everywhere)
    closed_form = True

    #: the expression as a value, (class, *arguments), from which `from_formula` makes it again;
    #: None where it reads tensors or calls a function: what it shows may change at any time
    formula: tuple[Any, ...] | None = None

    def dims(self, batch: int, heads: int) -> tuple[int, int]:
        """Leading sizes (1 or batch, 1 or heads) that the expression depends on."""
        return 1, 1

    def tiles(self, grid: Grid, b: Tensor, h: Tensor, q_block: Tensor, kv_block: Tensor) -> Tensor:
        raise NotImplementedError

    def key(
        self, grid: Grid, b: Tensor, h: Tensor, q_block: Tensor, kv_block: Tensor
    ) -> dict[object, Tensor]:
        raise NotImplementedError

    def elements(self, grid: Grid, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        raise NotImplementedError

    def block_size(self) -> tuple[int, int]:
        """The largest block size it can be compiled for."""
        return 128, 128

    def validate(self, grid: Grid) -> None:
        """Raise ValueError where the expression's tensors do not fit the mask's sizes."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors the expression reads."""
        return ()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Mask:
        """Copy of the expression with function(tensor) for each of its tensors."""
        return self

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Mask:
        """Copy of the expression with its tensors on `device`."""
        return self.mapped(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Mask:
        """Copy of the expression with its tensors in page-locked memory."""
        return self.mapped(Tensor.pin_memory)

    def to_dense(
        self,
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Every element, bool (batch or 1, heads or 1, q_len, kv_len): the definition."""
        device = torch.device(device)
        mask, grid = self.to(device), Grid(q_len, kv_len, 1, 1, device)
        mask.validate(grid)
        leading = mask.dims(batch, heads)
        b, h, i, j = (
            torch.arange(n, device=device).view([-1 if d == axis else 1 for d in range(4)])
            for axis, n in enumerate((*leading, q_len, kv_len))
        )
        return mask.elements(grid, b, h, i, j).expand(*leading, q_len, kv_len)

    def __and__(self, other: Mask) -> Mask:
        return And(self, _operand(other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _operand(other))

    def __rand__(self, other: Any) -> Mask:  # never a Mask: raises an error with a hint
        return And(_operand(other), self)

    def __ror__(self, other: Any) -> Mask:
        return Or(_operand(other), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a Mask has no truth value; combine masks with & | ~, not with and, or, not"
        )


def from_formula(formula: tuple[Any, ...]) -> Mask:
    kind, *arguments = formula
    return kind(*(from_formula(x) if isinstance(x, tuple) else x for x in arguments))


def _operand(value: Any) -> Mask:
    if not isinstance(value, Mask):
        raise not_a_mask("mask", value, "another mask expression")
    return value


class _Pair(Mask):
    symbol = "?"

    def __init__(self, left: Mask, right: Mask):
        self.left, self.right = left, right
        if left.formula is not None and right.formula is not None:
            self.formula = (type(self), left.formula, right.formula)

    @property
    def closed_form(self):
        return self.left.closed_form or self.right.closed_form

    def dims(self, batch, heads):
        (lb, lh), (rb, rh) = self.left.dims(batch, heads), self.right.dims(batch, heads)
        return max(lb, rb), max(lh, rh)

    def block_size(self):
        (lq, lk), (rq, rk) = self.left.block_size(), self.right.block_size()
        return min(lq, rq), min(lk, rk)

    def validate(self, grid):
        self.left.validate(grid)
        self.right.validate(grid)

    def key(self, *at):
        return {**self.left.key(*at), **self.right.key(*at)}

    def tensors(self):
        return self.left.tensors() + self.right.tensors()

    def mapped(self, function):
        return type(self)(self.left.mapped(function), self.right.mapped(function))

    def to(self, device, *, non_blocking=False):
        left, right = (m.to(device, non_blocking=non_blocking) for m in (self.left, self.right))
        return type(self)(left, right)

    def __repr__(self):
        return f"({self.left!r} {self.symbol} {self.right!r})"


class And(_Pair):
    symbol = "&"

    def tiles(self, *at):
        return torch.minimum(self.left.tiles(*at), self.right.tiles(*at))

    def elements(self, *at):
        return self.left.elements(*at) & self.right.elements(*at)


class Or(_Pair):
    symbol = "|"

    def tiles(self, *at):
        return torch.maximum(self.left.tiles(*at), self.right.tiles(*at))

    def elements(self, *at):
        return self.left.elements(*at) | self.right.elements(*at)


class Not(Mask):
    def __init__(self, inner: Mask):
        self.inner = inner
        if inner.formula is not None:
            self.formula = (Not, inner.formula)

    @property
    def closed_form(self):
        return self.inner.closed_form

    def dims(self, batch, heads):
        return self.inner.dims(batch, heads)

    def block_size(self):
        return self.inner.block_size()

    def validate(self, grid):
        self.inner.validate(grid)

    def tiles(self, *at):
        return FULL - self.inner.tiles(*at)

    def key(self, *at):
        return self.inner.key(*at)

    def elements(self, *at):
        return ~self.inner.elements(*at)

    def tensors(self):
        return self.inner.tensors()

    def mapped(self, function):
        return Not(self.inner.mapped(function))

    def to(self, device, *, non_blocking=False):
        return Not(self.inner.to(device, non_blocking=non_blocking))

    def __repr__(self):
        return f"~{self.inner!r}"


def classify(full: Tensor, empty: Tensor) -> Tensor:
    """Tile class from two conditions; both false means PARTIAL."""
    return torch.where(full, FULL, torch.where(empty, EMPTY, PARTIAL)).to(torch.uint8)
