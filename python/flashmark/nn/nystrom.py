"""Attention through learned landmarks alone, as a module."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmark.arguments import check_count
from flashmark.autograd import check_no_derivative, reached
from flashmark.nn.cache import StateCache, check_cache
from flashmark.nn.projected import ProjectedAttention
from flashmark.nn.tokens import Packing, check_packed, check_tokens
from flashmark.nystrom.attention import NORMALIZATIONS, nystrom_attention
from flashmark.nystrom.checks import MAX_LANDMARKS
from flashmark.nystrom.landmark_core import init_landmarks, landmark_core, mark_landmarks
from flashmark.nystrom.state import NystromState


class NystromAttention(ProjectedAttention):
    """Causal self-attention through learned landmarks: linear time, a state of constant size.

    There is no rotary embedding here: landmarks stand at no position, so the product of a landmark
    with a rotated key would depend on where the sequence began. Order comes from `decay`, from
    learned positions or a short convolution before this module, or from `HybridAttention`.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        landmarks: how many a key head has, 1 to 256.
        num_kv_heads: key and value heads, a divisor of `num_heads`; as many when None.
        head_dim: width of a head; embed_dim / num_heads when None.
        decay: learn a rate >= 0 per landmark at which it forgets. They start with memories of 1 to
            8000 tokens.
        normalize: "landmark" or "mass", as in `nystrom_attention`.
        bias: of the projections.

    The landmarks, and the raw decay, are parameters that `landmark_parameter_groups` keeps out of
    weight decay. Their core is computed in every call; a cache keeps the one that it began with.

    `forward(x, *, key_mask=None, cu_seqlens=None, cache=None)`:
        x: (B, N, embed_dim), any floating-point dtype.
        key_mask: bool (B, N), True where a token takes part. The others are as if they had been
            taken out before, and their own output is 0.
        cu_seqlens: int32 (S + 1,), bounds of S sequences in x (1, N, embed_dim): each as if alone.
        cache: from `init_cache`, updated in place. Without gradients only.
    Returns (B, N, embed_dim).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        landmarks: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        decay: bool = False,
        normalize: str = "landmark",
        bias: bool = False,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias)
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected 'landmark' or 'mass', got {normalize!r}")
        self.normalize = normalize
        landmarks = check_count("landmarks", landmarks, most=MAX_LANDMARKS)
        self.landmarks = mark_landmarks(
            nn.Parameter(init_landmarks(self.num_kv_heads, landmarks, self.head_dim))
        )
        self.landmark_decay = None
        if decay:
            rates = torch.exp(-torch.linspace(0, 9, landmarks)).repeat(self.num_kv_heads, 1)
            self.landmark_decay = mark_landmarks(nn.Parameter(rates.expm1().log()))

    def decay(self) -> Tensor | None:
        """(Hkv, M) per token, >= 0: softplus of the parameter `landmark_decay`."""
        return None if self.landmark_decay is None else F.softplus(self.landmark_decay)

    def init_cache(
        self,
        batch: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        """The state before any token. `max_length` is not needed: any number of them fits."""
        batch, place = check_count("batch", batch, 0), self._place(dtype, device)
        place["dtype"] = torch.promote_types(place["dtype"], torch.float32)
        marks = self.landmarks.shape[1]
        state = NystromState.empty(batch, self.num_kv_heads, marks, self.head_dim, **place)
        length = torch.zeros(batch, dtype=torch.int32, device=place["device"])
        return StateCache(state, length)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        check_tokens(x, self.embed_dim, key_mask)
        check_packed(cu_seqlens, x, key_mask, cache)
        if cache is not None:
            check_cache(cache, StateCache, x, key_mask)
        packing = takes_part = None
        if key_mask is not None:
            packing = Packing.of(key_mask)
            x = packing.pack(x.masked_fill(~key_mask[..., None], 0.0))
            takes_part = torch.arange(x.shape[1], device=x.device) < packing.counts[:, None]
        query, key, value = self.project(x)
        if cache is None:
            out = nystrom_attention(
                query, key, value, self.landmarks, decay=self.decay(), normalize=self.normalize,
                key_mask=takes_part, cu_seqlens=cu_seqlens,
            )  # fmt: skip
            out = reached(out, self.landmarks, self.landmark_decay)
        else:
            check_no_derivative("cache", query, key, value)
            if cache.core is None:
                kind = "softmax" if self.normalize == "landmark" else "kernel"
                cache.core = landmark_core(self.landmarks, kind=kind)
            core = cache.core
            cache.record(key, value, takes_part, functools.partial(self._consume, core))
            counts = x.shape[1] if packing is None else packing.counts
            out = self._decode(core, query, key, value, cache.state, takes_part, counts)
            cache.length += counts
        out = self.merge_heads(out)
        if packing is not None:
            out = packing.unpack(out).masked_fill(~key_mask[..., None], 0.0)
        return out

    def _decode(self, core, query, key, value, state, takes_part, counts) -> Tensor:
        """The output of tokens after `state`, which is updated in place."""
        decay = self.decay()
        out = nystrom_attention(
            query, key, value, self.landmarks, decay=decay, normalize=self.normalize,
            key_mask=takes_part, core=core, state=state, state_out=state,
        )  # fmt: skip
        if takes_part is not None and decay is not None:
            # the tokens left out come last and must not advance the decay
            left_out = (key.shape[2] - counts)[:, None, None]
            state.L.add_(decay.to(state.L.dtype) * left_out)
        return out

    def _consume(self, core, state: NystromState, key: Tensor, value: Tensor, counts: Tensor):
        """The state after the first `counts` (B,) of these tokens; `state` is updated in place."""
        takes_part = torch.arange(key.shape[2], device=key.device) < counts[:, None]
        self._decode(core, torch.zeros_like(key), key, value, state, takes_part, counts)
        return state

    def extra_repr(self) -> str:
        decays = self.landmark_decay is not None
        return f"{self._repr('normalize')}, landmarks={self.landmarks.shape[1]}, decay={decays}"
