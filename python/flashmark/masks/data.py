"""Masks that read a bool tensor, and lengths of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.masks.arguments import (
    BLOCK_SIZES,
    bool_tensor,
    check_batch,
    check_block_size,
    check_length,
    four_dims,
    integer,
    integer_tensor,
)
from flashmark.masks.expression import FULL, PARTIAL, Grid, Mask
from flashmark.masks.positions import Prefix, shared


class KeyVisible(Mask):
    """A bool for each key: (B, Nk)."""

    def __init__(self, visible: Tensor):
        self.visible = visible

    def dims(self, batch, heads):
        check_batch("key_padding", self.visible.shape[0], batch)
        return self.visible.shape[0], 1

    def _row(self, b):
        return shared(b, self.visible.shape[0])

    def validate(self, grid):
        check_length("key_padding", self.visible.shape[1], grid.kv_len)

    def tiles(self, grid, b, h, q_block, kv_block):
        low, high = extremes(self.visible.to(torch.uint8), grid.block_kv)
        none_some_all = low + high  # 0 EMPTY, 1 PARTIAL, 2 FULL
        return none_some_all[self._row(b), kv_block]

    def key(self, grid, b, h, q_block, kv_block):
        classes = self.tiles(grid, b, h, q_block, kv_block).long()
        block = self._row(b) * grid.kv_blocks + kv_block
        return {("key_padding", id(self)): block.where(classes == PARTIAL, -1 - classes)}

    def elements(self, grid, b, h, i, j):
        return self.visible[self._row(b), j]

    def tensors(self):
        return (self.visible,)

    def mapped(self, function):
        return KeyVisible(function(self.visible))

    def __repr__(self):
        return f"key_padding(<{'x'.join(map(str, self.visible.shape))} bool>)"


def key_padding(lengths: Tensor) -> Mask:
    """Keys that take part: integer lengths (B,), or bool (B, Nk) with True = visible. B may be 1:
    the same for all samples."""
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths: expected a bool (B, Nk) or integer (B,) tensor, got {type(lengths).__name__}"
        )
    if lengths.dtype is not torch.bool:
        return Prefix(integer_tensor("lengths", lengths, (1,)), "key_padding")
    if lengths.dim() != 2:
        raise ValueError(f"lengths: expected bool (B, Nk), got shape {tuple(lengths.shape)}")
    return KeyVisible(lengths)


class Blocks(Mask):
    """A bool for each tile, of 2 to 4 dimensions."""

    def __init__(self, given: Tensor, block_size: tuple[int, int], max_blocks: int | None):
        self.given, self.size, self.max_blocks = given, block_size, max_blocks

    @property
    def visible(self) -> Tensor:
        """(B | 1, H | 1, nQ, nK)"""
        return four_dims(self.given)

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
        b, h = shared(b, self.visible.shape[0]), shared(h, self.visible.shape[1])
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
        return (self.given,)

    def mapped(self, function):
        return Blocks(function(self.given), self.size, self.max_blocks)

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
    bool_tensor("map", map)
    if max_blocks is not None:
        max_blocks = integer("max_blocks", max_blocks, 1)
    size = check_block_size(block_size)
    if any(n % BLOCK_SIZES[0] for n in size):
        raise ValueError(f"block_size: expected multiples of {BLOCK_SIZES[0]}, got {block_size!r}")
    return Blocks(map, size, max_blocks)


class Dense(Mask):
    """A bool for each element, of 2 to 4 dimensions."""

    def __init__(self, given: Tensor):
        self.given = given

    @property
    def visible(self) -> Tensor:
        """(B | 1, H | 1, Nq, Nk)"""
        return four_dims(self.given)

    def dims(self, batch, heads):
        check_batch("visible", self.visible.shape[0], batch)
        check_batch("visible", self.visible.shape[1], heads, "heads")
        return self.visible.shape[0], self.visible.shape[1]

    def _rows(self, b, h):
        return shared(b, self.visible.shape[0]), shared(h, self.visible.shape[1])

    def validate(self, grid):
        if tuple(self.visible.shape[2:]) != (grid.q_len, grid.kv_len):
            raise ValueError(
                f"visible: expected {grid.q_len} x {grid.kv_len}, got {tuple(self.visible.shape)}"
            )

    def tiles(self, grid, b, h, q_block, kv_block):
        low, high = extremes(self.visible.to(torch.uint8), grid.block_kv)
        low, _ = extremes(low.transpose(-1, -2), grid.block_q)
        _, high = extremes(high.transpose(-1, -2), grid.block_q)
        return (low + high)[(*self._rows(b, h), kv_block, q_block)]

    def key(self, grid, b, h, q_block, kv_block):
        return every_tile(self, grid, *self._rows(b, h), q_block, kv_block)

    def elements(self, grid, b, h, i, j):
        return self.visible[(*self._rows(b, h), i, j)]

    def tensors(self):
        return (self.given,)

    def mapped(self, function):
        return Dense(function(self.given))

    def __repr__(self):
        return f"dense(<{'x'.join(map(str, self.visible.shape))} bool>)"


def dense(visible: Tensor) -> Mask:
    """Any mask, given element by element: bool (Nq, Nk), (H, Nq, Nk) or (B | 1, H | 1, Nq, Nk)."""
    return Dense(bool_tensor("visible", visible))


def whole_tensor(mask: Mask) -> Tensor | None:
    """The tensor of a mask that is nothing else, (B | 1, H | 1, Nq, Nk)."""
    return mask.visible if isinstance(mask, Dense) else None


def every_tile(mask: Mask, grid: Grid, b, h, q_block, kv_block) -> dict[object, Tensor]:
    """The key of a mask with unknown contents: no two tiles are assumed to be equal."""
    return {
        ("tile", id(mask)): q_block * grid.kv_blocks + kv_block,
        ("line", id(mask)): (b << 24) + h,
    }


def extremes(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each block of the last dimension, ragged end included."""
    blocks = -(-x.shape[-1] // block)
    pad = blocks * block - x.shape[-1]
    if pad:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], pad)], dim=-1)
    return x.unflatten(-1, (blocks, block)).aminmax(dim=-1)
