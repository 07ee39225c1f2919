"""The part of a BlockMask that one rank computes."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.masks.block_mask import BlockMask, TileLists, unpack_bits
from flashmark.masks.compile import _FullTiles, _tile_lists


def ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [start, start + count) written out: the number of each one's range, and its value."""
    number = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    place = torch.arange(number.numel(), device=counts.device) - (counts.cumsum(0) - counts)[number]
    return number, starts[number] + place


def local_mask(
    mask: BlockMask, lines: Tensor, columns: Tensor, q_len: int, kv_len: int
) -> BlockMask:
    """The tiles of some query blocks over some key blocks, as a mask of its own.

    `lines` and `columns` ascend, and hold every tile of the chosen lines; the whole problem's
    ragged last block, where chosen, is then last here too.
    """
    leading, line_count = (mask.batch, mask.heads), lines.numel()
    line = (torch.arange(mask.batch * mask.heads)[:, None] * mask.q_blocks + lines).flatten()
    column = torch.full((mask.kv_blocks,), -1)
    column[columns] = torch.arange(columns.numel())

    def entries(offsets: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        number, entry = ranges(offsets[line].long(), offsets.diff()[line].long())
        return number, *values[entry].long().T

    number, first, length = entries(mask.rows.run_offsets, mask.rows.runs)
    run, block = ranges(first, length)
    full = _FullTiles(torch.empty(3, 0, dtype=torch.long), _places(number[run], block, line_count))
    number, block, bits = entries(mask.rows.partial_offsets, mask.rows.partials)
    partial = _places(number, block, line_count)
    for tiles in (full.single, partial):
        tiles[2] = column[tiles[2]]
    kept_in = unpack_bits(mask.tile_bits, mask.block_kv).sum((1, 2))
    shape = (line_count, columns.numel())
    return BlockMask(
        rows=_tile_lists(leading, *shape, full, partial, bits),
        cols=_tile_lists(leading, *shape[::-1], full.transposed(), partial[[0, 2, 1]], bits),
        tile_bits=mask.tile_bits,
        kept=kept_in[bits].sum() + full.tiles() * mask.block_q * mask.block_kv,
        q_len=q_len,
        kv_len=kv_len,
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        batch=mask.batch,
        heads=mask.heads,
    )


def _places(number: Tensor, block: Tensor, lines: int) -> Tensor:
    """(3, n): leading index, line, key block."""
    return torch.stack([number // lines, number % lines, block]) if lines else block.new_empty(3, 0)


def select_leading(mask: BlockMask, batch: Tensor, heads: Tensor) -> BlockMask:
    """The mask of some of its samples and heads."""
    mask_bits = unpack_bits(mask.tile_bits, mask.block_kv).sum((1, 2))
    batch, heads = batch.to(mask.device), heads.to(mask.device)
    leading = (batch[:, None] * mask.heads + heads).flatten()

    def select(lists: TileLists, lines: int) -> TileLists:
        line = (leading[:, None] * lines + torch.arange(lines, device=mask.device)).flatten()

        def entries(offsets: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            counts = offsets.diff()[line].long()
            _, entry = ranges(offsets[line].long(), counts)
            return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), values[entry]

        return TileLists(
            *entries(lists.run_offsets, lists.runs),
            *entries(lists.partial_offsets, lists.partials),
            lists.counts[batch][:, heads],
            lists.order[batch][:, heads],
        )

    rows = select(mask.rows, mask.q_blocks)
    area = mask.block_q * mask.block_kv
    return BlockMask(
        rows=rows,
        cols=select(mask.cols, mask.kv_blocks),
        tile_bits=mask.tile_bits,
        kept=rows.runs[:, 1].sum() * area + mask_bits[rows.partials[:, 1].long()].sum(),
        q_len=mask.q_len,
        kv_len=mask.kv_len,
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        batch=batch.numel(),
        heads=heads.numel(),
        kind=mask.kind,
    )
