"""Exact attention nearby and landmarks far away, as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmark.hybrid import hybrid_attention
from flashmark.hybrid.checks import MERGES
from flashmark.nn.cache import StateCache, check_cache, check_no_gradient
from flashmark.nn.projected import ProjectedAttention, check_rotary, reached
from flashmark.nn.rotary import apply_rotary, rotary_angles
from flashmark.nn.tokens import check_tokens
from flashmark.nystrom.landmark_core import init_landmarks, landmark_core, mark_landmarks
from flashmark.sharded import is_sharded, local_part

GATES = ("token", "head")


class HybridAttention(ProjectedAttention):
    """Causal self-attention: exact to the nearest tokens, through learned landmarks to the rest.

    A token sees its own chunk of `window` tokens and the one before exactly, and what lies before
    these as landmarks hold it. Linear time, a state of constant size.

    The rotary embedding turns the first `rotary_dim` dimensions of a head, and landmarks live in
    the others, where keys have no position: which landmark a token goes to depends on its content
    alone, while the logits of near tokens, and of slots (their mean key is a mean of rotated keys,
    so its logit is the mean of theirs), depend on distances alone.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        landmarks: how many a key head has, 1 to 256.
        window: tokens of a chunk; `window` to 2 * `window` - 1 tokens before a token are near.
        merge: "slots", "mass" or "gate", as in `hybrid_attention`.
        num_kv_heads: key and value heads, a divisor of `num_heads`; as many when None.
        head_dim: width of a head; embed_dim / num_heads when None.
        rotary: base of the rotary position embedding (10000.0 is customary), or False for none.
        rotary_dim: how many dimensions of a head it rotates, less than head_dim; half when None.
        gate: for merge="gate": the share of the near field is a sigmoid of a projection of the
            token ("token"), or of a number per head ("head").
        bias: of the projections.

    `forward(x, *, key_mask=None, cache=None)`:
        x: (B, N, embed_dim), any floating-point dtype.
        key_mask: bool (B, N), True where a token takes part. The others are as if they had been
            taken out before, and their own output is 0. How many there are is read from the
            device, so that `torch.compile` cannot make one graph of it.
        cache: from `init_cache`, updated in place. Without gradients only.
    Returns (B, N, embed_dim).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        landmarks: int,
        *,
        window: int,
        merge: str = "slots",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: float | bool = False,
        rotary_dim: int | None = None,
        gate: str = "token",
        bias: bool = False,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias)
        if merge not in MERGES:
            raise ValueError(f"merge: expected one of {', '.join(MERGES)}, got {merge!r}")
        if gate not in GATES:
            raise ValueError(f"gate: expected 'token' or 'head', got {gate!r}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window: expected an int >= 1, got {window!r}")
        if rotary_dim is None:
            rotary_dim = self.head_dim // 4 * 2
        check_rotary(rotary, rotary_dim, self.head_dim - 1)
        self.rotary, self.rotary_dim = rotary, 0 if rotary is False else rotary_dim
        self.window, self.merge = window, merge
        free = self.head_dim - self.rotary_dim
        self.landmarks = mark_landmarks(
            nn.Parameter(init_landmarks(self.num_kv_heads, landmarks, free))
        )
        self.gate: nn.Module | nn.Parameter | None = None
        if merge == "gate" and gate == "token":
            self.gate = nn.Linear(embed_dim, num_heads)
        elif merge == "gate":
            self.gate = nn.Parameter(torch.zeros(num_heads))

    def init_cache(
        self,
        batch: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        """The state before any token. `max_length` is not needed: any number of them fits.

        Nor is `dtype`: the state takes that of the first keys and values.
        """
        device = self._place(dtype, device)["device"]
        return StateCache(None, torch.zeros(batch, dtype=torch.int32, device=device))

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None, cache: StateCache | None = None
    ) -> Tensor:
        check_tokens(x, self.embed_dim, key_mask)
        if cache is not None:
            check_cache(cache, StateCache, x, key_mask)
        if x.shape[0] == 0:
            key_mask = None
        kept, bounds = x, None
        if key_mask is not None:  # one packed sequence of the tokens that take part
            kept = x[key_mask][None]
            counts = key_mask.sum(1, dtype=torch.int32)
            bounds = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        query, key, value = self.project(kept)
        if self.rotary is not False:
            angles = rotary_angles(
                self._positions(x, key_mask, cache), self.rotary_dim, self.rotary
            )
            query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        options: dict[str, Any] = {
            "window": self.window, "merge": self.merge, "gate": self._gate(kept),
            "core": self._core(cache), "cu_seqlens": bounds,
        }  # fmt: skip
        # of this rank's heads where they are divided: a DTensor may be padded as a whole alone
        marks = self.landmarks if is_sharded(query) else local_part(self.landmarks)
        landmarks = F.pad(marks, (self.rotary_dim, 0))
        if cache is None:
            out = hybrid_attention(query, key, value, landmarks, **options)
            gate = self.gate.parameters() if isinstance(self.gate, nn.Module) else [self.gate]
            out = reached(out, self.landmarks, *gate)
        else:
            check_no_gradient(query, key, value)
            out, cache.state = hybrid_attention(
                query, key, value, landmarks, state=cache.state, return_state=True, **options
            )
            cache.length += x.shape[1] if key_mask is None else counts
        out = self.merge_heads(out)
        if key_mask is None:
            return out
        return out.new_zeros(*x.shape[:2], self.embed_dim).masked_scatter(key_mask[..., None], out)

    def _positions(self, x, key_mask, cache) -> Tensor:
        """How many tokens that take part stand before each of them, (B | 1, N) or packed."""
        if key_mask is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        else:
            positions = key_mask.cumsum(1) - 1
        positions = positions if cache is None else positions + cache.length[:, None]
        return positions if key_mask is None else positions[key_mask][None]

    def _gate(self, x: Tensor) -> Tensor | None:
        if self.gate is None:
            return None
        if isinstance(self.gate, nn.Parameter):
            return self.gate.sigmoid().view(1, -1, 1, 1)
        return self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)

    def _core(self, cache: StateCache | None) -> Tensor | None:
        """Of the landmarks as they are; a cache keeps the one that it began with."""
        if self.merge == "slots":
            return None
        if cache is not None and cache.core is not None:
            return cache.core
        kind = "softmax" if self.merge == "gate" else "kernel"
        core = landmark_core(self.landmarks, scale=1.0 / math.sqrt(self.head_dim), kind=kind)
        if cache is not None:
            cache.core = core
        return core

    def extra_repr(self) -> str:
        marks = self.landmarks.shape[1]
        return f"{self._repr('window', 'merge', 'rotary', 'rotary_dim')}, landmarks={marks}"
