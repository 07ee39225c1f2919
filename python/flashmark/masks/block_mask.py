"""BlockMask: a compiled mask, as the kernels read it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

KINDS = ("sparse", "causal", "dense")


class TileLists(NamedTuple):
    """The visible tiles along lines (query blocks, or key blocks when transposed).

    Line `x` of leading indices (b, h) is number `(b * heads + h) * lines + x`; a leading size of 1
    is shared. All int32. Runs and partial tiles of a line are in ascending order of block.
    """

    run_offsets: (
        Tensor  # (lines_total + 1,): runs of line x are runs[run_offsets[x] : run_offsets[x + 1]]
    )
    runs: Tensor  # (n, 2): first block, number of blocks; every tile in it FULL
    partial_offsets: Tensor  # (lines_total + 1,)
    partials: Tensor  # (m, 2): block, row of tile_bits
    counts: Tensor  # (batch, heads, lines): tiles in the line, FULL and PARTIAL
    order: Tensor  # (batch, heads, lines): lines by falling count


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask compiled for (q_len, kv_len) and a block size. Build it with
    `flashmark.masks.compile_mask`.

    `rows` lists the tiles of each query block, `cols` the same tiles of each key block (the
    backward's view). `tile_bits` (U, block_q, ceil(block_kv / 32)) int32 holds the distinct PARTIAL
    tiles: key `32 * w + k` of the tile is bit `k` of word `w`; bits beyond the lengths are 0.
    `kept` is the number of visible elements, counted once per leading index. `kind` is "sparse", or
    "causal" / "dense" when comparison alone decides.

    A registered pytree: it passes through `torch.compile`, checkpointing and `tree_map`.
    """

    rows: TileLists
    cols: TileLists
    tile_bits: Tensor
    kept: Tensor
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    batch: int
    heads: int
    kind: str = "sparse"

    @property
    def device(self) -> torch.device:
        return self.tile_bits.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch or 1, heads or 1, q_len, kv_len)"""
        return self.batch, self.heads, self.q_len, self.kv_len

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    @property
    def density(self) -> float:
        """Fraction of elements that are visible, exact. Reads one number back from the device."""
        return int(self.kept) / max(1, self.batch * self.heads * self.q_len * self.kv_len)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of `from_tensors`."""
        return [*self.rows, *self.cols, self.tile_bits, self.kept]

    @property
    def layout(self) -> list[int]:
        """The integers that, with `tensors()` and `kind`, make up the mask."""
        return [self.q_len, self.kv_len, self.block_q, self.block_kv, self.batch, self.heads]

    @functools.cached_property
    def _packed(self) -> tuple[list[Tensor], list[int], str]:
        """`pack_mask` of this mask: a call would spend a microsecond on the lists."""
        return (self.tensors() if self.kind == "sparse" else []), self.layout, self.kind

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: copies and pickles make lists of their own."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @staticmethod
    def from_tensors(tensors: list[Tensor], layout: list[int], kind: str) -> BlockMask:
        rows, cols = TileLists(*tensors[:6]), TileLists(*tensors[6:12])
        tile_bits, kept = tensors[12:14]
        q_len, kv_len, block_q, block_kv, batch, heads = layout
        return BlockMask(
            rows, cols, tile_bits, kept, q_len, kv_len, block_q, block_kv, batch, heads, kind
        )

    def mapped(self, function: Callable[[Tensor], Tensor]) -> BlockMask:
        """Copy of the mask with function(tensor) for each of its tensors.

        The copies can be used in training even where they are made in inference mode.
        """
        with torch.inference_mode(False), torch.no_grad():
            tensors = [function(t) for t in self.tensors()]
        return BlockMask.from_tensors(tensors, self.layout, self.kind)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BlockMask:
        return self.mapped(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> BlockMask:
        """A copy in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return self.mapped(Tensor.pin_memory)

    @staticmethod
    def cat(masks: Sequence[BlockMask]) -> BlockMask:
        """One mask of all samples, in order, from masks with equal sizes and heads.

        `torch.utils.data.default_collate` joins the masks of its samples by this.
        """
        first = masks[0]
        shapes = {(*m.layout[:4], m.heads): m for m in masks}
        if len(shapes) > 1:
            raise ValueError(
                "masks: expected equal lengths, block sizes and heads, got "
                + " and ".join(repr(m) for m in list(shapes.values())[:2])
            )
        starts = [0, *itertools.accumulate(m.tile_bits.shape[0] for m in masks)]
        rows, cols = (
            _joined([getattr(m, side) for m in masks], starts) for side in ("rows", "cols")
        )
        layout = [*first.layout[:4], sum(m.batch for m in masks), first.heads]
        kept = torch.stack([m.kept for m in masks]).sum()
        bits = torch.cat([m.tile_bits for m in masks])
        return BlockMask.from_tensors([*rows, *cols, bits, kept], layout, "sparse")

    def tile_grid(self, *, transposed: bool = False) -> Tensor:
        """Class of every tile, (batch, heads, q_blocks, kv_blocks) int32: -2 EMPTY, -1 FULL, else
        its row of tile_bits.

        `transposed=True` builds the same from the column form.
        """
        lists = self.cols if transposed else self.rows
        lines, blocks = self.q_blocks, self.kv_blocks
        if transposed:
            lines, blocks = blocks, lines
        total = self.batch * self.heads * lines
        change = torch.zeros(total, blocks + 1, dtype=torch.int32, device=self.device)
        line, (first, length) = (
            _lines(lists.run_offsets),
            lists.runs[: int(lists.run_offsets[-1])].T,
        )
        one = torch.ones_like(first)
        change.index_put_((line, first.long()), one, accumulate=True)
        change.index_put_((line, (first + length).long()), -one, accumulate=True)
        grid = change.cumsum(1, dtype=torch.int32)[:, :blocks] - 2
        line, (block, bits) = (
            _lines(lists.partial_offsets),
            lists.partials[: int(lists.partial_offsets[-1])].T,
        )
        grid[line, block.long()] = bits
        grid = grid.view(self.batch, self.heads, lines, blocks)
        return grid.transpose(2, 3) if transposed else grid

    def to_dense(self) -> Tensor:
        """Every element, bool (batch, heads, q_len, kv_len). For tests and small masks."""
        grid = self.tile_grid().long()
        bits = unpack_bits(self.tile_bits, self.block_kv)
        full = torch.ones(1, self.block_q, self.block_kv, dtype=torch.bool, device=self.device)
        table = torch.cat([~full, full, bits])[grid + 2]  # (B, H, nQ, nK, block_q, block_kv)
        dense = table.permute(0, 1, 2, 4, 3, 5).flatten(2, 3).flatten(3, 4)
        return dense[:, :, : self.q_len, : self.kv_len]

    def __repr__(self) -> str:
        return (
            f"BlockMask(shape={self.shape}, block_size=({self.block_q}, {self.block_kv}), "
            f"kind={self.kind!r}, distinct_tiles={self.tile_bits.shape[0]}, nbytes={self.nbytes})"
        )

    def __str__(self) -> str:
        from flashmark.masks.draw import draw_text

        return draw_text(self)

    def plot(self, ax=None, *, batch: int = 0, head: int = 0):
        """Draw one (batch, head) with matplotlib and return the axes."""
        from flashmark.masks.draw import plot

        return plot(self, ax, batch=batch, head=head)


def _joined(lists: list[TileLists], starts: list[int]) -> TileLists:
    """Lists one behind the other; `starts` are the first rows of tile_bits of each."""
    runs = [x.runs[: int(x.run_offsets[-1])] for x in lists]
    partials = [
        x.partials[: int(x.partial_offsets[-1])] + x.partials.new_tensor([0, start])
        for x, start in zip(lists, starts, strict=False)
    ]
    return TileLists(
        run_offsets=_joined_offsets([x.run_offsets for x in lists]),
        runs=torch.cat(runs),
        partial_offsets=_joined_offsets([x.partial_offsets for x in lists]),
        partials=torch.cat(partials),
        counts=torch.cat([x.counts for x in lists]),
        order=torch.cat([x.order for x in lists]),
    )


def _joined_offsets(offsets: list[Tensor]) -> Tensor:
    lengths = torch.cat([x.diff() for x in offsets])
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _lines(offsets: Tensor) -> Tensor:
    """The line of each entry of a CSR list."""
    lengths = (offsets[1:] - offsets[:-1]).long()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), lengths)


def heavy_first(counts: Tensor) -> Tensor:
    """Lines by falling tile count, ties in natural order: the longest work starts first."""
    return counts.argsort(dim=-1, descending=True, stable=True).int()


def pack_bits(visible: Tensor) -> Tensor:
    """bool (..., n) -> int32 (..., ceil(n / 32)), first element in the lowest bit."""
    words = -(-visible.shape[-1] // 32)
    padded = torch.nn.functional.pad(visible, (0, words * 32 - visible.shape[-1]))
    shifts = torch.arange(32, dtype=torch.int32, device=visible.device)
    bits = padded.unflatten(-1, (words, 32)).to(torch.int32) << shifts
    return bits.sum(-1, dtype=torch.int32)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """int32 (..., words) -> bool (..., n), the inverse of `pack_bits`."""
    shifts = torch.arange(32, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :n].bool()


def plain_mask(kind: str, q_len: int, kv_len: int) -> BlockMask:
    """A causal or dense mask without lists: kernels compare positions."""
    no_lists: Any = None
    return BlockMask(no_lists, no_lists, no_lists, no_lists, q_len, kv_len, 128, 128, 1, 1, kind)


def pack_mask(mask: BlockMask) -> tuple[list[Tensor], list[int], str]:
    """A mask as the arguments of an operator; no tensors where comparison decides."""
    if torch.compiler.is_compiling():
        return (mask.tensors() if mask.kind == "sparse" else []), mask.layout, mask.kind
    return mask._packed


def unpack_mask(tensors: list[Tensor], layout: list[int], kind: str) -> BlockMask:
    """The inverse of `pack_mask`."""
    if kind == "sparse":
        return BlockMask.from_tensors(tensors, layout, kind)
    return plain_mask(kind, layout[0], layout[1])


def _flatten(mask: BlockMask):
    return mask.tensors(), (tuple(mask.layout), mask.kind)


def _flatten_with_keys(mask: BlockMask):
    tensors, context = _flatten(mask)
    return [(pytree.SequenceKey(n), t) for n, t in enumerate(tensors)], context


def _unflatten(tensors, context) -> BlockMask:
    layout, kind = context
    return BlockMask.from_tensors(list(tensors), list(layout), kind)


pytree.register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    serialized_type_name="flashmark.masks.BlockMask",
    # JSON, which torch.export.save writes, has no tuples
    to_dumpable_context=lambda context: [list(context[0]), context[1]],
    from_dumpable_context=lambda dumped: (tuple(dumped[0]), dumped[1]),
    flatten_with_keys_fn=_flatten_with_keys,
)
