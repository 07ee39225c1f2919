"""Walking a mask row by row: which queries see which keys, as slices that PyTorch can multiply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.masks.block_mask import BlockMask, unpack_bits

ROWS = 128  # queries at a time where the mask has no blocks of its own
BUDGET = 1 << 20  # scores held at a time: a few megabytes stay in cache


class Row(NamedTuple):
    """A block of queries of some samples and heads, and the keys it sees."""

    batch: slice
    heads: slice
    queries: slice
    first_row: int  # the row of the mask that the first query is
    segments: list[tuple[int, int]]  # key ranges, ascending
    hidden: list[
        tuple[int, Tensor]
    ]  # column among the gathered keys, bool (queries, width): not visible

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.segments)


def rows(
    mask: BlockMask,
    shape: tuple[int, int, int],
    group: int,
    query_offset: Tensor | None,
    kv_lengths: Tensor | None,
) -> Iterator[Row]:
    """All rows that see a key, for queries (batch, heads, length) in groups of `group` heads."""
    batch, heads, q_len = shape
    if batch == 0:
        return
    read = _SparseRows(mask) if mask.kind == "sparse" else _PlainRows(mask)
    for b, h, offset in _parts(mask, batch, heads, query_offset):
        limit = mask.kv_len if kv_lengths is None else int(kv_lengths[b].max())
        start = 0
        while start < q_len:
            row = start + offset
            stop = min(q_len, start + read.step - row % read.step)
            segments, hidden = read(b.start, h.start, row, stop - start, limit)
            width = sum(last - first for first, last in segments)
            if width:
                yield from _within_budget(
                    b, h, slice(start, stop), row, segments, hidden, width, group
                )
            start = stop


def _parts(mask: BlockMask, batch: int, heads: int, query_offset: Tensor | None):
    """The samples and heads that share rows of the mask, with their offset."""
    offsets = [0] if query_offset is None else query_offset.tolist()
    alike = mask.batch == 1 and len(set(offsets)) == 1
    samples = [slice(0, batch)] if alike else [slice(b, b + 1) for b in range(batch)]
    shared = [slice(0, heads)] if mask.heads == 1 else [slice(h, h + 1) for h in range(heads)]
    for b in samples:
        for h in shared:
            yield b, h, offsets[b.start if len(offsets) > 1 else 0]


def _within_budget(b, h, queries, row, segments, hidden, width, group) -> Iterator[Row]:
    """Split samples and heads so that the scores of one part stay small; groups stay whole."""
    per_head = (queries.stop - queries.start) * width
    unit = min(group, h.stop - h.start)
    head_step = max(unit, BUDGET // per_head // unit * unit)
    batch_step = max(1, BUDGET // (per_head * min(head_step, h.stop - h.start)))
    for b0 in range(b.start, b.stop, batch_step):
        for h0 in range(h.start, h.stop, head_step):
            samples = slice(b0, min(b.stop, b0 + batch_step))
            yield Row(
                samples, slice(h0, min(h.stop, h0 + head_step)), queries, row, segments, hidden
            )


class _PlainRows:
    """Rows of a causal or dense mask, by comparison."""

    step = ROWS

    def __init__(self, mask: BlockMask):
        self.causal, self.offset = mask.kind == "causal", mask.kv_len - mask.q_len

    def __call__(self, b: int, h: int, row: int, count: int, limit: int):
        if not self.causal:
            return [(0, limit)], []
        position = row + self.offset
        stop = min(limit, max(0, position + count))
        start = min(stop, max(0, position + 1))
        keys, queries = torch.arange(start, stop), torch.arange(position, position + count)
        return [(0, stop)], [(start, keys > queries[:, None])] if stop > start else []


class _SparseRows:
    """Rows of compiled tile lists. The lists are read to the host once."""

    def __init__(self, mask: BlockMask):
        self.mask, self.step = mask, mask.block_q
        lists = mask.rows
        self.run_offsets, self.runs = lists.run_offsets.tolist(), lists.runs.tolist()
        self.partial_offsets, self.partials = (
            lists.partial_offsets.tolist(),
            lists.partials.tolist(),
        )
        self.bits: dict[int, Tensor] = {}

    def __call__(self, b: int, h: int, row: int, count: int, limit: int):
        mask = self.mask
        line = (b if mask.batch > 1 else 0) * mask.heads + (h if mask.heads > 1 else 0)
        line = line * mask.q_blocks + row // mask.block_q
        runs = self.runs[self.run_offsets[line] : self.run_offsets[line + 1]]
        partials = self.partials[self.partial_offsets[line] : self.partial_offsets[line + 1]]
        entries = [(first, length, -1) for first, length in runs]
        entries += [(block, 1, bits) for block, bits in partials]

        segments: list[tuple[int, int]] = []
        hidden, column, inside = [], 0, row % mask.block_q
        for first, length, bits in sorted(entries):
            start = first * mask.block_kv
            stop = min(start + length * mask.block_kv, limit)
            if stop <= start:
                break
            if segments and segments[-1][1] == start:
                segments[-1] = (segments[-1][0], stop)
            else:
                segments.append((start, stop))
            if bits >= 0:
                tile = self._hidden(bits)[inside : inside + count, : stop - start]
                hidden.append((column, tile))
            column += stop - start
        return segments, hidden

    def _hidden(self, row: int) -> Tensor:
        if row not in self.bits:
            if (
                len(self.bits) >= 64
            ):  # masks with many distinct tiles: do not keep them all unpacked
                self.bits.clear()
            self.bits[row] = ~unpack_bits(self.mask.tile_bits[row], self.mask.block_kv)
        return self.bits[row]
