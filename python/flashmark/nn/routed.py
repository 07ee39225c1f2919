"""Exact attention over the key blocks that each token chooses, as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashmark.arguments import check_count
from flashmark.autograd import check_no_derivative, reached
from flashmark.nn.cache import KeyValueCache, check_cache
from flashmark.nn.projected import ProjectedAttention, check_rotary, check_softcap
from flashmark.nn.rotary import apply_rotary, rotary_angles
from flashmark.nn.tokens import Packing, check_packed, check_tokens, packed_places
from flashmark.nystrom.checks import MAX_LANDMARKS
from flashmark.nystrom.landmark_core import init_landmarks, mark_landmarks
from flashmark.routed import RoutedState, Routing, routed_attention
from flashmark.routed.checks import MAX_BLOCK
from flashmark.routed.summaries import update_summaries


class RoutedCache(KeyValueCache):
    """Keys and values of every token so far, and the summaries of their blocks.

    Attributes:
        length: int32 (B,), tokens held by each sample. Masked tokens are not held.
        max_length: tokens that fit.
        state: RoutedState of all blocks that fit; those of a sample from length // block_size on
            are not finished, and no query chooses one.
        key, value: (B, Hkv, capacity, D), the capacity being that of all blocks.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        block_size: int,
        landmarks: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        blocks = -(-max_length // block_size)
        super().__init__(
            batch, kv_heads, blocks * block_size, head_dim, None, dtype=dtype, device=device
        )
        self.max_length, self.block_size = max_length, block_size
        self.state = RoutedState.empty(
            batch, kv_heads, landmarks, head_dim, blocks=blocks,
            dtype=torch.promote_types(dtype, torch.float32), device=device,
        )  # fmt: skip

    def summarize(self, landmarks: Tensor | None, scale: float, counts: Tensor | int, most: int):
        """Summaries of the blocks of the newest `counts` tokens, `most` or fewer a sample."""
        update_summaries(
            self.state, self.key, landmarks, scale, self.length - counts, self.length, most,
            self.block_size,
        )  # fmt: skip

    def select(self, index: Tensor) -> None:
        """Keep samples `index` (B',) in this order; one may be repeated (beams)."""
        super().select(index)
        self.state = RoutedState(*(x[index] for x in self.state))


torch.serialization.add_safe_globals([RoutedCache])  # for torch.load, weights_only=True


class RoutedAttention(ProjectedAttention):
    """Causal self-attention over the key blocks that each token chooses.

    A token reads its own block, the `near` blocks before it, and the `top_k` finished blocks before
    these that score highest, as in `flashmark.routed_attention`. Scores read keys after the rotary
    embedding.

    Landmarks get no gradient from the output. Set `record_routing`, and add `routing_loss` of
    `routing` to the loss, to train them; or leave them as they are.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        landmarks: how many a key head has, 1 to 256; None: a block is known by its mean key.
        block_size: keys of a block, 1 to 1024.
        top_k: blocks that a token chooses, 0 or more.
        near: how many blocks before its own a token always reads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; as many when None. The query
            heads of one share its choice.
        head_dim: width of a head; embed_dim / num_heads when None.
        rotary: base of the rotary position embedding (10000.0 is customary), or False for none.
        rotary_dim: how many dimensions of a head it rotates; all when None.
        bias: of the projections.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: learn a logit per query head that joins the softmax's denominator only.

    Attributes:
        record_routing: True: each call without a cache leaves its `Routing` in `routing`.
        routing: of the newest such call, or None.

    `forward(x, *, key_mask=None, cu_seqlens=None, cache=None)`:
        x: (B, N, embed_dim), any floating-point dtype.
        key_mask: bool (B, N), True where a token takes part. The others are as if they had been
            taken out before: positions and blocks count those that are left, and their own output
            is 0.
        cu_seqlens: int32 (S + 1,), bounds of S sequences in x (1, N, embed_dim): each as if alone.
        cache: from `init_cache`. x and key_mask are then the tokens after those it holds; it is
            updated in place. Without gradients only.
    Returns (B, N, embed_dim).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        landmarks: int | None = None,
        *,
        block_size: int = 64,
        top_k: int = 16,
        near: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: float | bool = False,
        rotary_dim: int | None = None,
        bias: bool = False,
        softcap: float | None = None,
        sinks: bool = False,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias)
        self.block_size = check_count("block_size", block_size, most=MAX_BLOCK)
        self.top_k, self.near = check_count("top_k", top_k, 0), check_count("near", near, 0)
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        check_rotary(rotary, self.rotary_dim, self.head_dim)
        self.rotary, self.softcap = rotary, check_softcap(softcap)
        self.landmarks: nn.Parameter | None = None
        if landmarks is not None:
            landmarks = check_count("landmarks", landmarks, most=MAX_LANDMARKS)
            self.landmarks = mark_landmarks(
                nn.Parameter(init_landmarks(self.num_kv_heads, landmarks, self.head_dim))
            )
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.record_routing = False
        self.routing: Routing | None = None

    def init_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RoutedCache:
        """An empty cache for `max_length` tokens a sample, like the weights unless told otherwise.

        2 * batch * num_kv_heads * max_length * head_dim numbers, and for each block (head_dim + 1)
        a landmark and key head.
        """
        batch, max_length = check_count("batch", batch, 0), check_count("max_length", max_length)
        marks = 1 if self.landmarks is None else self.landmarks.shape[1]
        return RoutedCache(
            batch, self.num_kv_heads, max_length, self.head_dim, block_size=self.block_size,
            landmarks=marks, **self._place(dtype, device),
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: RoutedCache | None = None,
    ) -> Tensor:
        check_tokens(x, self.embed_dim, key_mask)
        check_packed(cu_seqlens, x, key_mask, cache)
        if cache is not None:
            check_cache(cache, RoutedCache, x, key_mask)
        tokens = x.shape[1]
        first = offset = packing = counts = None
        if cache is not None:
            first = cache.first_column(tokens)
            offset = cache.length - first
        if key_mask is not None:
            packing = Packing.of(key_mask, first)
            counts = packing.counts
            x = packing.pack(x.masked_fill(~key_mask[..., None], 0.0))
        query, key, value = self.project(x)
        if self.rotary is not False:
            positions = torch.arange(tokens, device=x.device)[None]
            positions = positions if offset is None else positions + offset[:, None]
            if cu_seqlens is not None:
                positions = packed_places(cu_seqlens, tokens)
            angles = rotary_angles(positions, self.rotary_dim, self.rotary)
            query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        if cache is None:
            out = self._attend(query, key, value, counts, cu_seqlens)
        else:
            out = self._decode(query, key, value, counts, cache, first, offset)
        out = self.merge_heads(out)
        if packing is not None:
            out = packing.unpack(out).masked_fill(~key_mask[..., None], 0.0)
        return out

    def _attend(self, query, key, value, counts, cu_seqlens) -> Tensor:
        found = routed_attention(
            query, key, value, self.landmarks, **self._options(), kv_lengths=counts,
            cu_seqlens=cu_seqlens, return_routing=self.record_routing,
        )  # fmt: skip
        out = found
        if self.record_routing:
            out, self.routing = found
        return reached(out, self.landmarks, self.sinks)

    def _decode(self, query, key, value, counts, cache: RoutedCache, first, offset) -> Tensor:
        check_no_derivative("cache", query, key, value)
        new = query.shape[2]
        counts = new if counts is None else counts
        cache.append(key, value, first, counts)
        landmarks = None if self.landmarks is None else self.landmarks.detach()
        cache.summarize(landmarks, 1.0 / math.sqrt(self.head_dim), counts, new)
        return routed_attention(
            query.to(cache.key.dtype), cache.key, cache.value, landmarks, **self._options(),
            query_offset=offset, kv_lengths=cache.length, state=cache.state,
        ).to(query.dtype)  # fmt: skip

    def _options(self) -> dict:
        names = "block_size", "top_k", "near", "softcap", "sinks"
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        marks = None if self.landmarks is None else self.landmarks.shape[1]
        return f"{self._repr('block_size', 'top_k', 'near', 'rotary')}, landmarks={marks}"
