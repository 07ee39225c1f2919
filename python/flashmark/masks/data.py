"""Masks that read tensors or call a function. Query i sits at p = i + (kv_len - q_len)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashmark.masks.arguments import (
    BLOCK_SIZES,
    check_batch,
    check_block_size,
    check_length,
    four_dims,
    integer,
    integer_tensor,
)
from flashmark.masks.expression import FULL, PARTIAL, Grid, Mask, classify
from flashmark.masks.positions import Prefix

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Documents(Mask):
    def __init__(self, ids: Tensor):
        self.ids = ids  # (B | 1, Nk)

    def dims(self, batch, heads):
        check_batch("ids", self.ids.shape[0], batch)
        return self.ids.shape[0], 1

    def _row(self, b):
        return _shared(b, self.ids.shape[0])

    def _of_query(self, grid, b, i):
        """Document of query i, -1 before the first key."""
        p = i + grid.offset
        ids = self.ids[self._row(b), p.clamp(min=0)].long()
        return torch.where(p < 0, -1, ids)

    def validate(self, grid):
        check_length("ids", self.ids.shape[1], grid.kv_len)

    def _block_extremes(self, grid: Grid):
        i = torch.arange(grid.q_len, device=grid.device)
        sample = torch.arange(self.ids.shape[0], device=grid.device)[:, None]
        queries = self._of_query(grid, sample, i)
        return (*_extremes(queries, grid.block_q), *_extremes(self.ids, grid.block_kv))

    def tiles(self, grid, b, h, q_block, kv_block):
        b = self._row(b)
        q_low, q_high, k_low, k_high = self._block_extremes(grid)
        q_low, q_high = q_low[b, q_block], q_high[b, q_block]
        k_low, k_high = k_low[b, kv_block], k_high[b, kv_block]
        same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & (q_low >= 0)
        apart = (q_high < k_low) | (q_low > k_high) | (q_high < 0) | (k_high < 0)
        return classify(same, apart)

    def key(self, grid, b, h, q_block, kv_block):
        return _every_tile(self, grid, self._row(b), torch.zeros_like(h), q_block, kv_block)

    def elements(self, grid, b, h, i, j):
        queries = self._of_query(grid, b, i)
        keys = self.ids[self._row(b), j]
        return (queries == keys) & (queries >= 0)

    def tensors(self):
        return (self.ids,)

    def to(self, device):
        return _Documents(self.ids.to(device))

    def __repr__(self):
        return f"documents(<{'x'.join(map(str, self.ids.shape))} ids>)"


def documents(ids: Tensor) -> Mask:
    """ids[b, p] == ids[b, j], ids an integer tensor (Nk,) or (B, Nk): packed sequences attend to
    themselves.

    A query at p < 0 and everything with a negative id sees nothing and is not seen.
    """
    return _Documents(torch.atleast_2d(integer_tensor("ids", ids, (1, 2))))


class _KeyVisible(Mask):
    """A bool for each key: (B, Nk)."""

    def __init__(self, visible: Tensor):
        self.visible = visible

    def dims(self, batch, heads):
        check_batch("key_padding", self.visible.shape[0], batch)
        return self.visible.shape[0], 1

    def _row(self, b):
        return _shared(b, self.visible.shape[0])

    def validate(self, grid):
        check_length("key_padding", self.visible.shape[1], grid.kv_len)

    def tiles(self, grid, b, h, q_block, kv_block):
        low, high = _extremes(self.visible.to(torch.uint8), grid.block_kv)
        none_some_all = low + high  # 0 EMPTY, 1 PARTIAL, 2 FULL
        return none_some_all[self._row(b), kv_block]

    def key(self, grid, b, h, q_block, kv_block):
        return {("key_padding", id(self)): self._row(b) * grid.kv_blocks + kv_block}

    def elements(self, grid, b, h, i, j):
        return self.visible[self._row(b), j]

    def tensors(self):
        return (self.visible,)

    def to(self, device):
        return _KeyVisible(self.visible.to(device))

    def __repr__(self):
        return f"key_padding(<{'x'.join(map(str, self.visible.shape))} bool>)"


def key_padding(lengths: Tensor) -> Mask:
    """Keys that take part: integer lengths (B,), or bool (B, Nk) with True = visible."""
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths: expected a bool (B, Nk) or integer (B,) tensor, got {type(lengths).__name__}"
        )
    if lengths.dtype is not torch.bool:
        return Prefix(integer_tensor("lengths", lengths, (1,)), "key_padding")
    if lengths.dim() != 2:
        raise ValueError(f"lengths: expected bool (B, Nk), got shape {tuple(lengths.shape)}")
    return _KeyVisible(lengths)


class Blocks(Mask):
    """A bool for each tile: (B | 1, H | 1, nQ, nK)."""

    def __init__(self, visible: Tensor, block_size: tuple[int, int], max_blocks: int | None):
        self.visible, self.size, self.max_blocks = visible, block_size, max_blocks

    def dims(self, batch, heads):
        check_batch("map", self.visible.shape[0], batch)
        check_batch("map", self.visible.shape[1], heads, "heads")
        return self.visible.shape[0], self.visible.shape[1]

    def block_size(self):
        return tuple(max(n for n in BLOCK_SIZES if size % n == 0) for size in self.size)

    def validate(self, grid):
        if not self.divides(grid):
            raise ValueError(
                f"block_size: expected a divisor of the map's {self.size}, "
                f"got {(grid.block_q, grid.block_kv)}"
            )
        expected = (-(-grid.q_len // self.size[0]), -(-grid.kv_len // self.size[1]))
        if tuple(self.visible.shape[2:]) != expected:
            raise ValueError(
                f"map: expected {expected} tiles of {self.size} for lengths "
                f"{grid.q_len} x {grid.kv_len}, got {tuple(self.visible.shape[2:])}"
            )

    def _lookup(self, b, h, i, j):
        b, h = _shared(b, self.visible.shape[0]), _shared(h, self.visible.shape[1])
        return self.visible[b, h, i // self.size[0], j // self.size[1]]

    def divides(self, grid: Grid) -> bool:
        return self.size[0] % grid.block_q == 0 and self.size[1] % grid.block_kv == 0

    def tiles(self, grid, b, h, q_block, kv_block):
        if not self.divides(grid):  # a coarse look at many tiles of the map
            shape = torch.broadcast_shapes(b.shape, h.shape, q_block.shape, kv_block.shape)
            return torch.full(shape, PARTIAL, dtype=torch.uint8, device=grid.device)
        inside = self._lookup(b, h, q_block * grid.block_q, kv_block * grid.block_kv)
        return inside.to(torch.uint8) * FULL

    def key(self, grid, b, h, q_block, kv_block):
        inside = self._lookup(b, h, q_block * grid.block_q, kv_block * grid.block_kv)
        return {("blocks", id(self)): inside.long()}

    def elements(self, grid, b, h, i, j):
        return self._lookup(b, h, i, j)

    def tensors(self):
        return (self.visible,)

    def to(self, device):
        return Blocks(self.visible.to(device), self.size, self.max_blocks)

    def __repr__(self):
        return f"blocks(<{'x'.join(map(str, self.visible.shape))} bool>, {self.size})"


def blocks(
    map: Tensor, block_size: int | tuple[int, int], *, max_blocks: int | None = None
) -> Mask:
    """Visible tiles: bool (nQ, nK), (H, nQ, nK) or (B | 1, H | 1, nQ, nK), True = every element of
    the tile.

    `block_size` must be a multiple of the size it is compiled for. Alone, or `&` a closed form, it
    compiles without reading anything back from the device, into buffers for at most `max_blocks`
    tiles (default: all).
    """
    map = four_dims("map", map)
    if max_blocks is not None:
        max_blocks = integer("max_blocks", max_blocks, 1)
    size = check_block_size(block_size)
    if any(n % BLOCK_SIZES[0] for n in size):
        raise ValueError(f"block_size: expected multiples of {BLOCK_SIZES[0]}, got {block_size!r}")
    return Blocks(map, size, max_blocks)


class _Dense(Mask):
    def __init__(self, visible: Tensor):
        self.visible = visible

    def dims(self, batch, heads):
        check_batch("visible", self.visible.shape[0], batch)
        check_batch("visible", self.visible.shape[1], heads, "heads")
        return self.visible.shape[0], self.visible.shape[1]

    def _rows(self, b, h):
        return _shared(b, self.visible.shape[0]), _shared(h, self.visible.shape[1])

    def validate(self, grid):
        if tuple(self.visible.shape[2:]) != (grid.q_len, grid.kv_len):
            raise ValueError(
                f"visible: expected {grid.q_len} x {grid.kv_len}, got {tuple(self.visible.shape)}"
            )

    def tiles(self, grid, b, h, q_block, kv_block):
        low, high = _extremes(self.visible.to(torch.uint8), grid.block_kv)
        low, _ = _extremes(low.transpose(-1, -2), grid.block_q)
        _, high = _extremes(high.transpose(-1, -2), grid.block_q)
        return (low + high)[(*self._rows(b, h), kv_block, q_block)]

    def key(self, grid, b, h, q_block, kv_block):
        return _every_tile(self, grid, *self._rows(b, h), q_block, kv_block)

    def elements(self, grid, b, h, i, j):
        return self.visible[(*self._rows(b, h), i, j)]

    def tensors(self):
        return (self.visible,)

    def to(self, device):
        return _Dense(self.visible.to(device))

    def __repr__(self):
        return f"dense(<{'x'.join(map(str, self.visible.shape))} bool>)"


def dense(visible: Tensor) -> Mask:
    """Any mask, spelled out: bool (Nq, Nk), (H, Nq, Nk) or (B | 1, H | 1, Nq, Nk)."""
    return _Dense(four_dims("visible", visible))


def whole_tensor(mask: Mask) -> Tensor | None:
    """The tensor of a mask that is nothing else, (B | 1, H | 1, Nq, Nk)."""
    return mask.visible if isinstance(mask, _Dense) else None


class _MaskMod(Mask):
    closed_form = False

    def __init__(self, fn: MaskMod, device: torch.device | None = None):
        self.fn, self.device = fn, device

    def dims(self, batch, heads):
        one = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=self.device)
        b = torch.arange(batch, device=self.device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=self.device).view(1, -1, 1, 1)
        shape = self.elements(None, b, h, one, one).shape
        shape = (1,) * (4 - len(shape)) + tuple(shape)
        return shape[0], shape[1]  # a size of 1 proves that the function does not read that index

    def tiles(self, grid, b, h, q_block, kv_block):
        shape = torch.broadcast_shapes(b.shape, h.shape, q_block.shape, kv_block.shape)
        return torch.full(shape, PARTIAL, dtype=torch.uint8, device=grid.device)

    def key(self, grid, b, h, q_block, kv_block):
        return _every_tile(self, grid, b, h, q_block, kv_block)

    def elements(self, grid, b, h, i, j):
        out = self.fn(b, h, i, j)
        if not isinstance(out, Tensor) or out.dtype is not torch.bool:
            got = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"fn: expected a function that returns a bool tensor, got {got}")
        return out

    def to(self, device):
        return _MaskMod(self.fn, device)

    def __repr__(self):
        return f"mask_mod({getattr(self.fn, '__name__', self.fn)})"


def mask_mod(fn: MaskMod) -> Mask:
    """FlexAttention's signature: fn(b, h, q, kv) -> bool, on raw indices as broadcastable 4-d index
    tensors.

    Evaluated a band of tiles at a time. Tensors that `fn` closes over must be on the device it is
    compiled for.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a callable (b, h, q, kv) -> bool, got {type(fn).__name__}")
    return _MaskMod(fn)


def _shared(index: Tensor, size: int) -> Tensor:
    """An index into a dimension of `size`; 1 is shared by all samples or heads."""
    return index if size > 1 else torch.zeros_like(index)


def _every_tile(mask: Mask, grid: Grid, b, h, q_block, kv_block) -> dict[object, Tensor]:
    """The key of a mask of which nothing is known: no two tiles are promised to be equal."""
    return {
        ("tile", id(mask)): q_block * grid.kv_blocks + kv_block,
        ("line", id(mask)): (b << 24) + h,
    }


def _extremes(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each block of the last dimension, ragged end included."""
    blocks = -(-x.shape[-1] // block)
    pad = blocks * block - x.shape[-1]
    if pad:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], pad)], dim=-1)
    return x.unflatten(-1, (blocks, block)).aminmax(dim=-1)
