"""Exact attention over the keys that a mask shows, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashmark.arguments import check_count
from flashmark.autograd import check_no_derivative, reached
from flashmark.block_sparse import block_sparse_attention
from flashmark.hybrid.layout import PackedRows
from flashmark.masks import Mask, causal
from flashmark.masks.cache import compiled
from flashmark.nn.cache import KeyValueCache, check_cache
from flashmark.nn.projected import ProjectedAttention, check_dropout, check_rotary, check_softcap
from flashmark.nn.rotary import apply_rotary, rotary_angles
from flashmark.nn.tokens import Packing, check_packed, check_tokens, packed_places


class BlockSparseAttention(ProjectedAttention):
    """Self-attention, exact over the keys that a mask shows.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; as many when None.
        head_dim: width of a head; embed_dim / num_heads when None.
        mask: expression of what each token sees, such as `causal() & sliding_window(512)`; plain
            causal when None. One object may be given to many layers: it is compiled once.
        is_causal: False with mask=None: every token sees every token.
        rotary: base of the rotary position embedding (10000.0 is customary), or False for none.
        rotary_dim: how many dimensions of a head it rotates; all when None.
        bias: of the projections.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: learn a logit per query head that joins the softmax's denominator only.
        dropout_p: probability of dropping an attention weight while training.

    `forward(x, *, key_mask=None, cu_seqlens=None, mask=None, cache=None)`:
        x: (B, N, embed_dim), any floating-point dtype.
        key_mask: bool (B, N), True where a token takes part. The others are as if they had been
            taken out before: rotary positions and the rows and columns of `mask` count those that
            are left (so left and right padding give the same), and their own output is 0.
        cu_seqlens: int32 (S + 1,), bounds of S sequences in x (1, N, embed_dim): each as if alone.
            Attention spreads them over S rows of the longest length, which waits for a GPU.
        mask: for this call, instead of the module's own; without a cache only.
        cache: from `init_cache`. x and key_mask are then the tokens after those it holds; it is
            updated in place. Without gradients only.
    Returns (B, N, embed_dim).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask | None = None,
        is_causal: bool = True,
        rotary: float | bool = False,
        rotary_dim: int | None = None,
        bias: bool = False,
        softcap: float | None = None,
        sinks: bool = False,
        dropout_p: float = 0.0,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias)
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"mask: expected a mask expression or None, got {type(mask).__name__}")
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        check_rotary(rotary, self.rotary_dim, self.head_dim)
        self.mask = causal() if mask is None and is_causal else mask
        self.rotary, self.softcap = rotary, check_softcap(softcap)
        self.dropout_p = check_dropout(dropout_p)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    def init_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KeyValueCache:
        """An empty cache for `max_length` tokens a sample, like the weights unless told otherwise.

        2 * batch * num_kv_heads * max_length * head_dim numbers.
        """
        if self.mask is None:
            raise ValueError("cache: expected a causal module, got is_causal=False")
        batch, max_length = check_count("batch", batch, 0), check_count("max_length", max_length)
        place = self._place(dtype, device)
        sizes = batch, self.num_heads, max_length, max_length
        mask = compiled(self.mask, *sizes, place["device"])
        return KeyValueCache(batch, self.num_kv_heads, max_length, self.head_dim, mask, **place)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Mask | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        check_tokens(x, self.embed_dim, key_mask)
        check_packed(cu_seqlens, x, key_mask, cache)
        if mask is not None and cache is not None:
            raise ValueError("mask: expected None with a cache, which has its own, got a mask")
        if cache is not None:
            check_cache(cache, KeyValueCache, x, key_mask)
        batch, tokens = x.shape[:2]
        first = offset = packing = None
        if cache is not None:
            first = cache.first_column(tokens)
            offset = cache.length - first
        if key_mask is not None:
            packing = Packing.of(key_mask, first)
            x = packing.pack(x.masked_fill(~key_mask[..., None], 0.0))
        query, key, value = self.project(x)
        if self.rotary is not False:
            positions = torch.arange(tokens, device=x.device)[None]
            positions = positions if offset is None else positions + offset[:, None]
            if cu_seqlens is not None:
                positions = packed_places(cu_seqlens, tokens)
            angles = rotary_angles(positions, self.rotary_dim, self.rotary)
            query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        visible = self.mask if mask is None else mask
        if cu_seqlens is not None:
            sequences = PackedRows(cu_seqlens, tokens)
            rows = (sequences.rows_of(x) for x in (query, key, value))
            out = sequences.packed(
                self._attend(*rows, visible, sequences.lengths.int(), None, None)
            )
        else:
            counts = None if packing is None else packing.counts
            out = self._attend(query, key, value, visible, counts, cache, first)
        out = self.merge_heads(out)
        if packing is not None:
            out = packing.unpack(out).masked_fill(~key_mask[..., None], 0.0)
        return out

    def _attend(self, query, key, value, mask, counts, cache, first) -> Tensor:
        options: dict[str, Any] = {"softcap": self.softcap, "sinks": self.sinks}
        if self.training:
            options["dropout_p"] = self.dropout_p
        if cache is None:
            out = block_sparse_attention(query, key, value, mask, kv_lengths=counts, **options)
            return reached(out, self.sinks)
        check_no_derivative("cache", query, key, value)
        offset = cache.length - first
        cache.append(key, value, first, query.shape[2] if counts is None else counts)
        return block_sparse_attention(
            query.to(cache.key.dtype), cache.key, cache.value, cache.mask,
            query_offset=offset, kv_lengths=cache.length, **options,
        ).to(query.dtype)  # fmt: skip

    def extra_repr(self) -> str:
        return self._repr("mask", "rotary")
