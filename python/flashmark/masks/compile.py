"""compile_mask: from a mask expression to the tile lists that kernels read."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark import native
from flashmark.masks.arguments import BLOCK_SIZES, check_block_size, integer, not_a_mask
from flashmark.masks.block_mask import BlockMask, TileLists, heavy_first, pack_bits
from flashmark.masks.capacity import compile_with_capacity, reads_only_blocks
from flashmark.masks.data import whole_tensor
from flashmark.masks.expression import EMPTY, FULL, Grid, Mask
from flashmark.masks.positions import Band, plain_kind

COARSE = 64  # a coarse look covers COARSE x COARSE tiles
FINE_LIMIT = 1 << 16  # tile grids up to this size are classified without a coarse look
LOOKED_AT = 1 << 22  # tiles classified at a time
BAND = 1 << 20  # elements evaluated at a time: few enough for a cache


def compile_mask(
    mask: Mask | None,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    *,
    device: torch.device | str,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """Compile a mask expression for given sizes.

    Args:
        mask: the expression; None means that every key is visible.
        batch, heads: sizes of the query tensor. Masks that do not depend on them are stored once.
        q_len, kv_len: query and key lengths. For decoding into a cache, the cache's full size,
            twice.
        device: where the BlockMask's tensors live.
        block_size: 16, 32, 64, 128, or a pair (queries, keys) of those.

    Example:
        >>> from flashmark import compile_mask, masks
        >>> mask = masks.causal() & masks.sliding_window(64)
        >>> print(compile_mask(mask, 1, 1, 256, 256, device="cpu", block_size=32))
        BlockMask(...density=0.2192)
          ▒▒
          ██▒▒
          ▒▒██▒▒
            ▒▒██▒▒
              ▒▒██▒▒
                ▒▒██▒▒
                  ▒▒██▒▒
                    ▒▒██▒▒

    Time and memory grow with the tiles that are neither FULL nor part of a large uniform area;
    nothing of size q_len x kv_len is allocated.

    Raises:
        TypeError, ValueError: a size or block size out of range, or tensors in the mask that do not
            fit.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise not_a_mask("mask", mask, "a flashmark mask expression or None")
    batch, heads = integer("batch", batch, 0), integer("heads", heads, 0)
    q_len, kv_len = integer("q_len", q_len, 0), integer("kv_len", kv_len, 0)
    block_q, block_kv = check_block_size(block_size)
    if not {block_q, block_kv} <= {*BLOCK_SIZES}:
        raise ValueError(
            f"block_size: expected 16, 32, 64, 128 or a pair of them, got {block_size!r}"
        )
    grid = Grid(q_len, kv_len, block_q, block_kv, torch.device(device))
    if mask is None or not batch or not heads:  # there are no query rows
        mask = Band(None, None)
    # a mask compiled in inference mode serves training as well
    with torch.inference_mode(False), torch.no_grad():
        mask = mask.to(grid.device)
        mask.validate(grid)
        leading = mask.dims(batch, heads)
        if reads_only_blocks(mask):
            return compile_with_capacity(mask, grid, leading, _compile)
        if grid.device.type == "meta":
            return _without_values(mask, grid, leading)
        visible = whole_tensor(mask)
        if visible is not None and native.preferred(grid.device):
            return _compile_dense(visible, grid)
        return _compile(mask, grid, leading, plain_kind(mask) or "sparse")


def _without_values(mask: Mask, grid: Grid, leading: tuple[int, int]) -> BlockMask:
    """BlockMask for tensors without values: its lists are as long as anywhere else."""
    if mask.formula is None:
        raise NotImplementedError(
            "mask: expected an expression of positions for tensors on meta, got one that reads "
            "tensors or calls a function"
        )
    elsewhere = dataclasses.replace(grid, device=torch.device("cpu"))
    return _compile(mask, elsewhere, leading, plain_kind(mask) or "sparse").to(grid.device)


def _compile(mask: Mask, grid: Grid, leading: tuple[int, int], kind: str = "sparse") -> BlockMask:
    if native.preferred(grid.device) and _tiles(grid, leading) <= FINE_LIMIT:
        return _compile_small(mask, grid, leading, kind)
    full, tiles = _classify(mask, grid, leading)
    tile_bits, visible, row_of, proved_full = _evaluate(mask, grid, leading, tiles)
    full = full.with_tiles(tiles[:, proved_full])
    partial, row_of = tiles[:, row_of >= 0], row_of[row_of >= 0]
    lines, blocks = grid.q_blocks, grid.kv_blocks
    return BlockMask(
        rows=_tile_lists(leading, lines, blocks, full, partial, row_of),
        cols=_tile_lists(leading, blocks, lines, full.transposed(), partial[[0, 2, 1]], row_of),
        tile_bits=tile_bits,
        kept=visible[row_of].sum() + full.tiles() * grid.block_q * grid.block_kv,
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        batch=leading[0],
        heads=leading[1],
        kind=kind,
    )


def _compile_small(mask: Mask, grid: Grid, leading: tuple[int, int], kind: str) -> BlockMask:
    """BlockMask from a grid of the classes of all tiles."""
    bh, row, column = _all_tiles(grid, leading[0] * leading[1])
    found = mask.tiles(grid, bh // leading[1], bh % leading[1], row, column)
    full = (found == FULL) & ~grid.ragged(row, column)
    classes = torch.where(full, -1, -2).int()
    at = torch.stack([x[(found != EMPTY) & ~full] for x in (bh, row, column)])
    tile_bits, visible, row_of, proved_full = _evaluate(mask, grid, leading, at)
    classes[tuple(at)] = torch.where(proved_full, -1, torch.where(row_of < 0, -2, row_of)).int()
    return _from_classes(classes, tile_bits, visible, grid, leading, kind)


def _from_classes(
    classes: Tensor, tile_bits: Tensor, visible: Tensor, grid: Grid, leading, kind: str = "sparse"
) -> BlockMask:
    """`classes` int32, -2 EMPTY, -1 FULL, else a row of tile_bits; `visible` elements of each."""
    areas = torch.nn.functional.pad(visible, (2, 0))
    areas[1:2] = grid.block_q * grid.block_kv
    classes = classes.view(*leading, grid.q_blocks, grid.kv_blocks)
    everywhere = classes.new_ones(1, dtype=torch.bool).expand(classes.shape)
    rows, cols, kept, _ = native.tile_lists(everywhere, classes, areas)
    layout = [grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, *leading]
    return BlockMask.from_tensors([*rows, *cols, tile_bits, kept], layout, kind)


def _compile_dense(visible: Tensor, grid: Grid) -> BlockMask:
    """BlockMask of a mask that is one tensor, as from `_compile`, in one pass over it."""
    area = grid.block_q * grid.block_kv
    bits, counts = native.pack_dense(visible, grid.block_q, grid.block_kv)
    classes, tile_bits, visible_of_row, _ = native.distinct_tiles(bits, counts, area)
    return _from_classes(classes, tile_bits, visible_of_row, grid, visible.shape[:2])


class _FullTiles(NamedTuple):
    """Squares of COARSE x COARSE tiles, and single tiles: (3, n) leading index, row, column."""

    squares: Tensor
    single: Tensor

    def with_tiles(self, tiles: Tensor) -> _FullTiles:
        return _FullTiles(self.squares, torch.cat([self.single, tiles], dim=1))

    def transposed(self) -> _FullTiles:
        return _FullTiles(self.squares[[0, 2, 1]], self.single[[0, 2, 1]])

    def tiles(self) -> int:
        return self.squares.shape[1] * COARSE**2 + self.single.shape[1]


def _classify(mask: Mask, grid: Grid, leading: tuple[int, int]) -> tuple[_FullTiles, Tensor]:
    """The FULL tiles, and a (3, n) list of the tiles that must be evaluated."""
    none = torch.empty(3, 0, dtype=torch.long, device=grid.device)
    leading_size = leading[0] * leading[1]
    if _tiles(grid, leading) <= FINE_LIMIT or not mask.closed_form:
        full, partial = _look(mask, grid, leading, *_all_tiles(grid, leading_size))
        return _FullTiles(none, full), partial

    coarse = grid.coarser(COARSE)
    squares, uncertain = _look(mask, coarse, leading, *_all_tiles(coarse, leading_size))
    inside = torch.arange(COARSE, device=grid.device)
    full, partial = [none], [none]
    for some in uncertain.split(LOOKED_AT // COARSE**2, dim=1):
        bh, row, column = (x.view(-1, 1, 1) for x in some)
        bh, row, column = torch.broadcast_tensors(
            bh, row * COARSE + inside.view(-1, 1), column * COARSE + inside
        )
        exists = (row < grid.q_blocks) & (column < grid.kv_blocks)
        found = _look(mask, grid, leading, bh[exists], row[exists], column[exists])
        full.append(found[0])
        partial.append(found[1])
    return _FullTiles(squares, torch.cat(full, dim=1)), torch.cat(partial, dim=1)


def _tiles(grid: Grid, leading: tuple[int, int]) -> int:
    return leading[0] * leading[1] * grid.q_blocks * grid.kv_blocks


def _all_tiles(grid: Grid, leading_size: int) -> tuple[Tensor, ...]:
    sizes = (leading_size, grid.q_blocks, grid.kv_blocks)
    return torch.meshgrid(*(torch.arange(n, device=grid.device) for n in sizes), indexing="ij")


def _look(mask: Mask, grid: Grid, leading, bh, row, column) -> tuple[Tensor, Tensor]:
    """Classify the given tiles: lists of the FULL and of the PARTIAL ones."""
    classes = mask.tiles(grid, bh // leading[1], bh % leading[1], row, column)
    full = (classes == FULL) & ~grid.ragged(row, column)
    partial = (classes != EMPTY) & ~full
    at = torch.stack([bh, row, column])
    return at[:, full], at[:, partial]


def _evaluate(mask: Mask, grid: Grid, leading: tuple[int, int], tiles: Tensor):
    """The bits of the given tiles, every distinct key evaluated once.

    Returns tile_bits (U, block_q, words), the visible elements of each (U,), for every given tile
    its row of tile_bits or -1 (it proved empty or full), and which of them proved full.
    """
    bh, row, column = tiles
    keys = mask.key(grid, bh // leading[1], bh % leading[1], row, column)
    keys["q_edge"] = (grid.q_len - row * grid.block_q).clamp(max=grid.block_q)
    keys["kv_edge"] = (grid.kv_len - column * grid.block_kv).clamp(max=grid.block_kv)
    group, representative = _group(list(keys.values()))

    area = grid.block_q * grid.block_kv
    packed, visible = [], []
    for some in tiles[:, representative].split(max(1, BAND // area), dim=1):
        elements = _elements(mask, grid, leading, some)
        if native.preferred(grid.device):
            bits, count = native.pack_tiles(elements)
            packed.append(bits[(count > 0) & (count < area)])
        else:
            count = elements.sum((1, 2))
            packed.append(pack_bits(elements[(count > 0) & (count < area)]))
        visible.append(count)
    words = -(-grid.block_kv // 32)
    packed.append(torch.empty(0, grid.block_q, words, dtype=torch.int32, device=grid.device))
    visible.append(group.new_empty(0))
    visible, packed = torch.cat(visible), torch.cat(packed)

    is_partial = (visible > 0) & (visible < area)
    tile_bits, same = packed, torch.arange(packed.shape[0], device=grid.device)
    if packed.shape[0] > 1 and native.preferred(grid.device):
        same, tile_bits, *_ = native.distinct_tiles(packed, visible[is_partial], area)
        same = same.long()
    elif packed.shape[0] > 1:
        tile_bits, same = torch.unique(packed, dim=0, return_inverse=True)
    row_of_group = torch.full_like(visible, -1)
    row_of_group[is_partial] = same
    visible_of_row = visible.new_empty(tile_bits.shape[0])
    visible_of_row[same] = visible[is_partial]
    return tile_bits, visible_of_row, row_of_group[group], (visible == area)[group]


def _group(keys: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Number the distinct combinations of keys: every entry's number, one entry of each."""
    combined, count = torch.zeros_like(keys[0]), 1
    if combined.numel() == 0:
        return combined, combined
    for key in keys:
        distinct, number = torch.unique(key, return_inverse=True)
        if distinct.numel() > 1:
            distinct, combined = torch.unique(
                combined * distinct.numel() + number, return_inverse=True
            )
            count = distinct.numel()
    entries = torch.arange(combined.numel(), device=combined.device)
    representative = entries.new_empty(count).scatter_(0, combined, entries)
    return combined, representative


def _elements(mask: Mask, grid: Grid, leading: tuple[int, int], tiles: Tensor) -> Tensor:
    """Visible elements of the given tiles, bool (n, block_q, block_kv); False outside."""
    bh, row, column = (x.view(-1, 1, 1, 1) for x in tiles)
    i = row * grid.block_q + torch.arange(grid.block_q, device=grid.device).view(-1, 1)
    j = column * grid.block_kv + torch.arange(grid.block_kv, device=grid.device)
    first, last = i.clamp(max=grid.q_len - 1), j.clamp(max=grid.kv_len - 1)
    elements = mask.elements(grid, bh // leading[1], bh % leading[1], first, last)
    if grid.q_len % grid.block_q or grid.kv_len % grid.block_kv:
        elements = elements & (i < grid.q_len) & (j < grid.kv_len)
    return elements.expand(-1, 1, grid.block_q, grid.block_kv).squeeze(1)


def _tile_lists(leading, lines: int, blocks: int, full: _FullTiles, partial, row_of) -> TileLists:
    """CSR lists along lines. Places are line * (blocks + 1) + block: no run crosses a line."""
    stride, total = blocks + 1, leading[0] * leading[1] * lines
    bh, line, block = full.single
    places, lengths = (bh * lines + line) * stride + block, torch.ones_like(bh)
    if full.squares.shape[1]:
        wide = -(-blocks // COARSE) + 1
        bh, line, block = full.squares
        band, long = _merge((bh * -(-lines // COARSE) + line) * wide + block, torch.ones_like(bh))
        bh_line, block = band // wide, band % wide
        bh, line = bh_line // -(-lines // COARSE), bh_line % -(-lines // COARSE)
        inside = torch.arange(COARSE, device=bh.device).view(-1, 1)
        spread = (bh * lines + line * COARSE + inside) * stride + block * COARSE
        places = torch.cat([places, spread.flatten()])
        lengths = torch.cat([lengths, (long * COARSE).expand_as(spread).flatten()])
    places, lengths = _merge(places, lengths)
    run_line, first = places // stride, places % stride

    bh, line, block = partial
    place, order = ((bh * lines + line) * stride + block).sort()
    partial_line = place // stride

    counts = torch.bincount(partial_line, minlength=total)
    counts = counts.index_add(0, run_line, lengths).view(*leading, lines)
    return TileLists(
        run_offsets=_offsets(run_line, total),
        runs=torch.stack([first, lengths], dim=1).int(),
        partial_offsets=_offsets(partial_line, total),
        partials=torch.stack([place % stride, row_of[order]], dim=1).int(),
        counts=counts.int(),
        order=heavy_first(counts),
    )


def _merge(places: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sort segments [place, place + length) and join those that touch."""
    places, order = places.sort()
    lengths = lengths[order]
    starts = torch.ones_like(places, dtype=torch.bool)
    starts[1:] = places[1:] != places[:-1] + lengths[:-1]
    first = places[starts]
    return first, torch.zeros_like(first).index_add_(0, starts.cumsum(0) - 1, lengths)


def _offsets(line: Tensor, total: int) -> Tensor:
    counts = torch.bincount(line, minlength=total)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
