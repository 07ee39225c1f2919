"""Masks of packed sequences, by the number of each token's document or by cumulative lengths."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashmark.masks.arguments import check_batch, integer_tensor, not_a_mask
from flashmark.masks.data import every_tile, extremes
from flashmark.masks.expression import FULL, Grid, Mask, classify
from flashmark.masks.positions import Band, shared


class Documents(Mask):
    """Equal, not negative ids: `ids` (Nk,) or (B | 1, Nk) of the keys, `query_ids` of the queries,
    by default those of the keys at their position."""

    def __init__(self, ids: Tensor, query_ids: Tensor | None = None):
        self.ids, self.query_ids = ids, query_ids

    def _rows(self) -> list[Tensor]:
        return [torch.atleast_2d(ids) for ids in self.tensors()]

    def dims(self, batch, heads):
        rows = self._rows()
        for ids in rows:
            check_batch("ids", ids.shape[0], batch)
        return max(ids.shape[0] for ids in rows), 1

    def validate(self, grid):
        wanted = [("ids", self.ids, grid.kv_len, "key")]
        if self.query_ids is not None:
            wanted = [("ids", self.query_ids, grid.q_len, "query"), ("key_ids", *wanted[0][1:])]
        for name, ids, length, what in wanted:
            if ids.shape[-1] != length:
                raise ValueError(
                    f"{name}: expected one entry per {what}, {length}, got {ids.shape[-1]}"
                )

    def _ids(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """(B | 1, q_len) and (B | 1, kv_len), where ids that no query may see equal no other id."""
        keys, *queries_alone = (ids.long() for ids in self._rows())
        if queries_alone:
            queries = queries_alone[0]
        elif grid.offset >= 0:
            queries = keys[:, grid.offset :]
        else:
            queries = torch.nn.functional.pad(keys, (-grid.offset, 0), value=-1)
        return queries.clamp(min=-1), keys.where(keys >= 0, -2)

    def _of_blocks(self, grid: Grid, b, q_block, kv_block) -> tuple[Tensor, ...]:
        """Smallest and largest id of each query block, and of each key block."""
        queries, keys = self._ids(grid)
        row, column = shared(b, queries.shape[0]), shared(b, keys.shape[0])
        of_queries = (x[row, q_block] for x in extremes(queries, grid.block_q))
        of_keys = (x[column, kv_block] for x in extremes(keys, grid.block_kv))
        return (*of_queries, *of_keys)

    def tiles(self, grid, b, h, q_block, kv_block):
        q_low, q_high, k_low, k_high = self._of_blocks(grid, b, q_block, kv_block)
        same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        apart = (q_high < k_low) | (q_low > k_high) | (q_high < 0) | (k_high < 0)
        return classify(same, apart)

    def key(self, grid, b, h, q_block, kv_block):
        """Key of a tile. Where a block holds one document, the ids of the other block decide."""
        q_low, q_high, k_low, k_high = self._of_blocks(grid, b, q_block, kv_block)
        one_query, one_key = q_low == q_high, k_low == k_high
        whole = one_query & one_key
        same = (whole & (q_low == k_low)).long()
        one = torch.where(one_query, q_low, torch.where(one_key, k_low, 0))
        at = id(self)
        return {
            ("documents of", at): torch.where(whole, same, one),
            ("query block", at): torch.where(whole, -2, torch.where(one_query, -1, q_block)),
            ("key block", at): torch.where(whole, -2, torch.where(one_key, -1, kv_block)),
            ("sample", at): torch.where(whole, 0, b),
        }

    def elements(self, grid, b, h, i, j):
        queries, keys = self._ids(grid)
        return queries[shared(b, queries.shape[0]), i] == keys[shared(b, keys.shape[0]), j]

    def tensors(self):
        return (self.ids,) if self.query_ids is None else (self.ids, self.query_ids)

    def mapped(self, function):
        return Documents(*map(function, self.tensors()))

    def __repr__(self):
        sizes = " and ".join("x".join(map(str, ids.shape)) for ids in reversed(self.tensors()))
        return f"documents(<{sizes} ids>)"


def documents(ids: Tensor, key_ids: Tensor | None = None) -> Mask:
    """Packed sequences attend to themselves: ids[b, p] == ids[b, j], ids an integer tensor (Nk,) or
    (B, Nk).

    A query at p < 0 and everything with a negative id sees nothing and is not seen.

    With `key_ids` (Nk,) or (B, Nk), `ids` are those of the queries, (Nq,) or (B, Nq): query i sees
    key j where ids[b, i] == key_ids[b, j]. That is cross-attention between packed sequences; where
    it is to be causal as well, each sequence aligned by itself, use `packed`.
    """
    integer_tensor("ids", ids, (1, 2))
    if key_ids is None:
        return Documents(ids)
    return Documents(integer_tensor("key_ids", key_ids, (1, 2)), ids)


@dataclasses.dataclass(frozen=True)
class _LocalGrid(Grid):
    """A grid whose positions count from the start of each token's own sequence.

    A tile that crosses a border has the extremes of its tokens.
    """

    query_position: Tensor  # (q_len,), among the keys of the sequence
    key_position: Tensor  # (kv_len,)

    @property
    def offset(self):
        return 0

    def positions(self, q_block):
        first, last = extremes(self.query_position, self.block_q)
        return first[q_block], last[q_block]

    def keys(self, kv_block):
        first, last = extremes(self.key_position, self.block_kv)
        return first[kv_block], last[kv_block]

    def delta(self, q_block, kv_block):
        return self.keys(kv_block)[0] - self.positions(q_block)[0]


class Packed(Mask):
    """`inner` within each sequence, as if there were no other."""

    def __init__(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, inner: Mask):
        self.of_queries, self.of_keys, self.inner = cu_seqlens_q, cu_seqlens_k, inner

    def validate(self, grid):
        for name, cumulative, length in (
            ("cu_seqlens_q", self.of_queries, grid.q_len),
            ("cu_seqlens_k", self.of_keys, grid.kv_len),
        ):
            ends = cumulative.tolist()
            if ends[0] != 0 or ends != sorted(ends) or ends[-1] > length:
                raise ValueError(
                    f"{name}: expected ascending numbers from 0 to at most {length}, got "
                    f"{ends if len(ends) <= 8 else [*ends[:4], '...', *ends[-3:]]}"
                )

    def _parts(self, grid: Grid) -> tuple[Documents, _LocalGrid]:
        of_queries, of_keys = self.of_queries.long(), self.of_keys.long()
        query_ids, query_position = _of_tokens(of_queries, grid.q_len)
        key_ids, key_position = _of_tokens(of_keys, grid.kv_len)
        ahead = of_keys.diff() - of_queries.diff()  # keys of a sequence before its query 0
        ahead = torch.nn.functional.pad(ahead, (0, 1))  # and of number -1
        query_position = query_position + ahead[query_ids]
        sizes = grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, grid.device
        local = _LocalGrid(*sizes, query_position, key_position)
        return Documents(key_ids, query_ids), local

    def tiles(self, grid, *at):
        documents, local = self._parts(grid)
        return torch.minimum(documents.tiles(grid, *at), self.inner.tiles(local, *at))

    def key(self, grid, b, h, q_block, kv_block):
        documents, local = self._parts(grid)
        at = (b, h, q_block, kv_block)
        whole = documents.tiles(grid, *at) == FULL
        inside = {k: v.where(whole, 0) for k, v in self.inner.key(local, *at).items()}
        across = {k: v.where(~whole, -1) for k, v in every_tile(self, grid, *at).items()}
        return inside | across

    def elements(self, grid, b, h, i, j):
        documents, local = self._parts(grid)
        inner = self.inner.elements(local, b, h, local.query_position[i], local.key_position[j])
        return documents.elements(grid, b, h, i, j) & inner

    def tensors(self):
        return self.of_queries, self.of_keys

    def mapped(self, function):
        return Packed(function(self.of_queries), function(self.of_keys), self.inner)

    def __repr__(self):
        return f"packed(<{self.of_queries.shape[0] - 1} sequences>, {self.inner!r})"


def _of_tokens(cumulative: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Sequence number of each token, -1 behind the last sequence, and its place in the sequence."""
    place = torch.arange(length, device=cumulative.device)
    number = torch.searchsorted(cumulative, place, right=True) - 1
    place = place - cumulative[number]
    return number.where(number < cumulative.shape[0] - 1, -1), place


def packed(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, mask: Mask | None = None
) -> Mask:
    """Sequences packed one behind the other, each masked by itself, as flash-attn's varlen
    functions take them.

    Args:
        cu_seqlens_q: integer (S + 1,): sequence s is the queries cu_seqlens_q[s] to
            cu_seqlens_q[s + 1] - 1. It starts with 0; queries behind its last entry see nothing.
        cu_seqlens_k: the same of the keys, for cross-attention; cu_seqlens_q when None.
        mask: what a query sees within its sequence: an expression of positions alone, every key
            when None. Position p is that of a query among the keys of its own sequence, so
            `causal()` is aligned to the bottom right of each: with n queries and m keys, query i
            of the sequence sees its keys j <= i + m - n.

    Raises:
        ValueError, TypeError: different numbers of sequences, or a mask that reads tensors or calls
            a function.
    """
    of_queries = integer_tensor("cu_seqlens_q", cu_seqlens_q, (1,))
    of_keys = of_queries
    if cu_seqlens_k is not None:
        of_keys = integer_tensor("cu_seqlens_k", cu_seqlens_k, (1,))
    if of_queries.shape[0] < 1 or of_keys.shape != of_queries.shape:
        raise ValueError(
            f"cu_seqlens_k: expected {max(1, of_queries.shape[0])} entries like cu_seqlens_q, "
            f"got {of_keys.shape[0]}"
        )
    if mask is None:
        return Packed(of_queries, of_keys, Band(None, None))
    if not isinstance(mask, Mask):
        raise not_a_mask("mask", mask, "an expression of positions or None")
    if mask.formula is None:
        raise ValueError(f"mask: expected an expression of positions alone, got {mask!r}")
    return Packed(of_queries, of_keys, mask)
