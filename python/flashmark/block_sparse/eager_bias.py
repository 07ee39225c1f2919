"""Additive bias, tile by tile, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.block_sparse.eager_tiles import Row


class Bias:
    """A relative bias (Hq, rows + Nk - 1), or a dense one broadcastable to (B, Hq, Nq, Nk)."""

    def __init__(self, bias: Tensor, mask_rows: int, dtype: torch.dtype):
        self.bias, self.mask_rows = bias, mask_rows
        self.total = torch.zeros(bias.shape, dtype=dtype, device=bias.device)
        self.relative = bias.dim() == 2

    def gradient(self) -> Tensor:
        return self.total.to(self.bias.dtype)

    def add_to(self, scores: Tensor, row: Row) -> None:
        for columns, part in self._tiles(row, self.bias):
            if self.relative:
                # entry key - query + mask_rows - 1: each query reads the same slice, one step
                # earlier
                part = part.unfold(-1, columns.stop - columns.start, 1).flip(-2)
            scores[..., columns] += part.to(scores.dtype)

    def accumulate(self, dscores: Tensor, row: Row) -> None:
        for columns, part in self._tiles(row, self.total):
            ds = dscores[..., columns].to(part.dtype)
            part += _diagonal_sums(ds.sum(0)) if self.relative else ds.sum_to_size(part.shape)

    def _tiles(self, row: Row, source: Tensor):
        """For each key range: its columns among the scores, the view of `source` behind it."""
        count, column = row.queries.stop - row.queries.start, 0
        for start, stop in row.segments:
            columns = slice(column, column + stop - start)
            if self.relative:
                first = start - (row.first_row + count - 1) + self.mask_rows - 1
                yield columns, source[row.heads, first : first + count + stop - start - 1]
            else:
                index = (row.batch, row.heads, row.queries, slice(start, stop))
                yield (
                    columns,
                    source[
                        tuple(
                            slice(None) if size == 1 else part
                            for size, part in zip(source.shape, index, strict=True)
                        )
                    ],
                )
            column = columns.stop


def _diagonal_sums(x: Tensor) -> Tensor:
    """(heads, n, w) -> (heads, n + w - 1): entry t sums x[:, i, j] over j - i == t - (n - 1)."""
    heads, n, w = x.shape
    padded = torch.nn.functional.pad(
        x.flip(1), (0, n)
    )  # rows of n + w, read again as rows of n + w - 1:
    return (
        padded.flatten(1)[:, : n * (n + w - 1)].view(heads, n, n + w - 1).sum(1)
    )  # each shifts by one
