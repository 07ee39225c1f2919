"""Compiling block maps without a host sync: fixed buffers, places by cumulative sums."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from flashmark import native
from flashmark.masks.block_mask import BlockMask, TileLists, heavy_first
from flashmark.masks.data import Blocks
from flashmark.masks.expression import And, Grid, Mask
from flashmark.masks.positions import prefix

CompileClosed = Callable[[Mask, Grid, tuple[int, int]], BlockMask]

REMEMBERED_TILES = 1 << 16  # grids up to this size are worth keeping


def _factors(mask: Mask) -> list[Mask]:
    return _factors(mask.left) + _factors(mask.right) if isinstance(mask, And) else [mask]


def reads_only_blocks(mask: Mask) -> bool:
    """True for block maps, alone or `&` closed forms that hold no tensors."""
    factors = _factors(mask)
    maps = [f for f in factors if isinstance(f, Blocks)]
    rest = [f for f in factors if not isinstance(f, Blocks)]
    return bool(maps) and all(f.closed_form and not f.tensors() for f in rest)


def compile_with_capacity(
    mask: Mask,
    grid: Grid,
    leading: tuple[int, int],
    compile_closed: CompileClosed,
) -> BlockMask:
    """BlockMask of a fixed capacity. Tiles that every map shows have their closed form's class,
    which the host knows."""
    closed: list[Mask] = []
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=grid.device)
    tiles = leading[0] * leading[1] * grid.q_blocks * grid.kv_blocks
    capacity = tiles
    for factor in _factors(mask):
        if isinstance(factor, Blocks):
            visible = visible & _tiles_of(factor, grid)
            capacity = min(capacity, factor.max_blocks or tiles)
        else:
            closed.append(factor)
    host = Grid(grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, torch.device("cpu"))
    if closed or grid.q_blocks * grid.kv_blocks > REMEMBERED_TILES:
        form = _form(closed, host, compile_closed)
    else:
        form = _everywhere(host, compile_closed)
    classes, tile_bits, area = (t.to(grid.device, non_blocking=True) for t in form)
    shape = (*leading, grid.q_blocks, grid.kv_blocks)
    classes = classes.expand(shape)
    lists = native.tile_lists if native.preferred(grid.device) else _tile_lists
    rows, cols, kept, taken = lists(visible.expand(shape), classes, area, capacity=capacity)

    message = f"max_blocks: expected at most {capacity} visible tiles, got more"
    if grid.device.type == "cpu":
        if int(taken) > capacity:
            raise ValueError(
                f"max_blocks: expected at most {capacity} visible tiles, got {int(taken)}"
            )
    else:
        torch._assert_async(taken <= capacity, message)
    return BlockMask(
        rows=TileLists(*rows),
        cols=TileLists(*cols),
        tile_bits=tile_bits,
        kept=kept,
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        batch=leading[0],
        heads=leading[1],
    )


def _form(closed: list[Mask], host: Grid, compile_closed: CompileClosed) -> tuple[Tensor, ...]:
    """The class of every tile, tile_bits, and the visible elements of each class from EMPTY on."""
    mask = functools.reduce(operator.and_, closed, prefix(host.kv_len))
    form = compile_closed(mask, host, (1, 1))
    areas = [0, host.block_q * host.block_kv, *(_visible_bits(bits) for bits in form.tile_bits)]
    return (
        form.tile_grid(),
        form.tile_bits,
        torch.tensor(areas, dtype=torch.long, device=host.device),
    )


@functools.lru_cache(maxsize=16)
def _everywhere(host: Grid, compile_closed: CompileClosed) -> tuple[Tensor, ...]:
    """`_form` of a map alone: equal for every map, and more expensive than the map's own lists."""
    with torch.inference_mode(False):
        return _form([], host, compile_closed)


def _visible_bits(words: Tensor) -> int:
    return sum(int(word & 0xFFFFFFFF).bit_count() for word in words.flatten().tolist())


def _tiles_of(blocks: Blocks, grid: Grid) -> Tensor:
    """The map at the compiled block size: (B | 1, H | 1, q_blocks, kv_blocks)."""
    q_ratio = blocks.size[0] // grid.block_q
    kv_ratio = blocks.size[1] // grid.block_kv
    visible = blocks.visible.repeat_interleave(q_ratio, -2).repeat_interleave(kv_ratio, -1)
    return visible[..., : grid.q_blocks, : grid.kv_blocks]


def _tile_lists(visible: Tensor, classes: Tensor, area: Tensor, *, capacity: int):
    """Lists and counts of tiles, as `native.tile_lists` returns them."""
    classes = torch.where(visible, classes, -2)
    rows, cols = _lists(classes, capacity), _lists(classes.transpose(-1, -2), capacity)
    return rows, cols, area[(classes + 2).long()].sum(), (classes > -2).sum()


def _lists(classes: Tensor, capacity: int) -> TileLists:
    """CSR lists in buffers of `capacity` entries. An extra last entry receives all tiles that are
    not listed, and is cut off."""
    *leading, lines, blocks = classes.shape
    classes = classes.reshape(-1, blocks)
    full, partial = classes == -1, classes >= 0
    starts = full.clone()
    starts[:, 1:] &= ~full[:, :-1]
    block = torch.arange(blocks, dtype=torch.int32, device=classes.device).expand_as(classes)

    run = (starts.flatten().cumsum(0) - 1).view_as(full)
    first = _scatter(block, run, starts, capacity)
    length = _scatter(full.int(), run, full, capacity)
    entry = (partial.flatten().cumsum(0) - 1).view_as(partial)
    partials = [_scatter(values, entry, partial, capacity) for values in (block, classes)]
    counts = (full | partial).sum(1).view(*leading, lines)
    return TileLists(
        run_offsets=_offsets(starts),
        runs=torch.stack([first, length], dim=1),
        partial_offsets=_offsets(partial),
        partials=torch.stack(partials, dim=1),
        counts=counts.int(),
        order=heavy_first(counts),
    )


def _scatter(values: Tensor, place: Tensor, chosen: Tensor, capacity: int) -> Tensor:
    """Sum the chosen values into their places."""
    place = torch.where(chosen, place, capacity).clamp(max=capacity).flatten()
    out = torch.zeros(capacity + 1, dtype=torch.int32, device=values.device)
    return out.index_add_(0, place, values.flatten().int())[:capacity]


def _offsets(member: Tensor) -> Tensor:
    return torch.nn.functional.pad(member.sum(1).cumsum(0), (1, 0)).int()
