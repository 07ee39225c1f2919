"""Compiling block maps without a host sync: fixed buffers, places by cumulative sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashmark.masks.block_mask import BlockMask, TileLists, heavy_first
from flashmark.masks.data import Blocks
from flashmark.masks.expression import And, Grid, Mask
from flashmark.masks.positions import prefix


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
    compile_closed: Callable[[Mask, Grid, tuple[int, int]], BlockMask],
) -> BlockMask:
    """Where every map says visible, a tile has the class of the closed form, known on the host."""
    closed: Mask = prefix(grid.kv_len)
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=grid.device)
    tiles = leading[0] * leading[1] * grid.q_blocks * grid.kv_blocks
    capacity = tiles
    for factor in _factors(mask):
        if isinstance(factor, Blocks):
            visible = visible & _tiles_of(factor, grid)
            capacity = min(capacity, factor.max_blocks or tiles)
        else:
            closed = closed & factor
    host = Grid(grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, torch.device("cpu"))
    form = compile_closed(closed, host, (1, 1))
    classes = form.tile_grid().to(grid.device, non_blocking=True)
    tile_bits = form.tile_bits.to(grid.device, non_blocking=True)
    classes = torch.where(visible, classes, -2).expand(*leading, -1, -1)

    taken = (classes > -2).sum()
    message = f"max_blocks: expected at most {capacity} visible tiles, got more"
    if grid.device.type == "cpu":
        if int(taken) > capacity:
            raise ValueError(
                f"max_blocks: expected at most {capacity} visible tiles, got {int(taken)}"
            )
    else:
        torch._assert_async(taken <= capacity, message)
    bits_of_row = torch.tensor([_visible_bits(bits) for bits in form.tile_bits], dtype=torch.long)
    area = torch.cat([torch.tensor([0, grid.block_q * grid.block_kv]), bits_of_row])
    kept = area.to(grid.device, non_blocking=True)[(classes + 2).long()].sum()
    return BlockMask(
        rows=_lists(classes, capacity),
        cols=_lists(classes.transpose(-1, -2), capacity),
        tile_bits=tile_bits,
        kept=kept,
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        batch=leading[0],
        heads=leading[1],
    )


def _visible_bits(words: Tensor) -> int:
    return sum(int(word & 0xFFFFFFFF).bit_count() for word in words.flatten().tolist())


def _tiles_of(blocks: Blocks, grid: Grid) -> Tensor:
    """The map at the compiled block size: (B | 1, H | 1, q_blocks, kv_blocks)."""
    q_ratio = blocks.size[0] // grid.block_q
    kv_ratio = blocks.size[1] // grid.block_kv
    visible = blocks.visible.repeat_interleave(q_ratio, -2).repeat_interleave(kv_ratio, -1)
    return visible[..., : grid.q_blocks, : grid.kv_blocks]


def _lists(classes: Tensor, capacity: int) -> TileLists:
    """CSR lists in buffers of `capacity` entries; one more takes what is not listed, and is cut."""
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
