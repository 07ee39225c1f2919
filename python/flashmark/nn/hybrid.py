"""Exact attention nearby and landmarks far away, as a module."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmark.arguments import MAX_DIM, check_count, readable
from flashmark.autograd import check_no_derivative, reached, without_autocast
from flashmark.hybrid import hybrid_attention
from flashmark.hybrid.call import MERGES
from flashmark.hybrid.step import masked_step
from flashmark.nn.cache import StateCache, check_cache
from flashmark.nn.projected import ProjectedAttention, check_rotary
from flashmark.nn.rotary import apply_rotary, rotary_angles
from flashmark.nn.tokens import check_packed, check_tokens, packed_places
from flashmark.nystrom.checks import MAX_LANDMARKS
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
        rotary_dim: how many dimensions of a head it rotates; half when None. All of them need
            merge="slots" and keys twice as wide: landmarks then read the keys before rotation.
        gate: for merge="gate": the share of the near field is a sigmoid of a projection of the
            token ("token"), or of a number per head ("head").
        bias: of the projections.

    `forward(x, *, key_mask=None, cu_seqlens=None, cache=None)`:
        x: (B, N, embed_dim), any floating-point dtype.
        key_mask: bool (B, N), True where a token takes part. The others are as if they had been
            taken out before, and their own output is 0. How many there are is read from the
            device, so that `torch.compile` cannot make one graph of it; not so for one token a
            sample after others in a cache.
        cu_seqlens: int32 (S + 1,), bounds of S sequences in x (1, N, embed_dim): each as if alone.
        cache: from `init_cache`, updated in place, in the dtype of the first tokens: later ones
            are cast to it, under autocast too. Without gradients only.
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
        if rotary_dim is None:
            rotary_dim = self.head_dim // 4 * 2
        check_rotary(rotary, rotary_dim, self.head_dim)
        self.rotary, self.rotary_dim = rotary, 0 if rotary is False else rotary_dim
        self.window, self.merge = check_count("window", window), merge
        landmarks = check_count("landmarks", landmarks, most=MAX_LANDMARKS)
        free = self.head_dim - self.rotary_dim
        if not free:
            if merge != "slots" or 2 * self.head_dim > MAX_DIM:
                raise NotImplementedError(
                    f"rotary_dim: expected less than head_dim {self.head_dim} with merge={merge!r} "
                    f"(all of it with 'slots' and a head_dim up to {MAX_DIM // 2}), "
                    f"got {rotary_dim}"
                )
            free = self.head_dim
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
        batch, device = check_count("batch", batch, 0), self._place(dtype, device)["device"]
        return StateCache(None, torch.zeros(batch, dtype=torch.int32, device=device))

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
        if x.shape[0] == 0:
            key_mask = None
        active = None
        if key_mask is not None and _is_step(x, key_mask, cache):
            x = x.masked_fill(~key_mask[..., None], 0.0)
            key_mask, active = None, key_mask
        kept, bounds = x, cu_seqlens
        if key_mask is not None:  # one packed sequence of the tokens that take part
            kept = x[key_mask][None]
            counts = key_mask.sum(1, dtype=torch.int32)
            bounds = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        query, key, value = self.project(kept)
        if self.rotary is not False:
            angles = rotary_angles(
                self._positions(x, key_mask, cu_seqlens, cache), self.rotary_dim, self.rotary
            )
            query, key = self._rotated(query, key, angles)
        gate = self._gate(kept)
        if cache is None:
            out = self._attend(query, key, value, gate=gate, cu_seqlens=bounds)
            learned = self.gate.parameters() if isinstance(self.gate, nn.Module) else [self.gate]
            out = reached(out, self.landmarks, *learned)
        else:
            check_no_derivative("cache", query, key, value)
            rows = (key, value) if key_mask is None else _rows(key_mask, key, value)
            core = self._core(cache)
            taking_part = key_mask if active is None else active
            cache.record(*rows, taking_part, functools.partial(self._consume, core))
            out, cache.state = self._decode(
                core, query, key, value, cache.state, gate, bounds, active
            )
            if active is not None:
                counts = active[:, 0]
            cache.length += x.shape[1] if taking_part is None else counts
        out = self.merge_heads(out)
        if active is not None:
            return out.masked_fill(~active[..., None], 0.0)
        if key_mask is None:
            return out
        return out.new_zeros(*x.shape[:2], self.embed_dim).masked_scatter(key_mask[..., None], out)

    def _attend(self, query, key, value, function=hybrid_attention, **options):
        # of this rank's heads where they are divided: a DTensor may be padded as a whole alone
        marks = self.landmarks if is_sharded(query) else local_part(self.landmarks)
        rotated = key.shape[3] - marks.shape[2]
        return function(
            query, key, value, F.pad(marks, (rotated, 0)) if rotated else marks,
            window=self.window, merge=self.merge, scale=1.0 / math.sqrt(self.head_dim), **options,
        )  # fmt: skip

    def _decode(self, core, query, key, value, state, gate, bounds, active=None):
        """Output and new state of tokens after `state`; of one token a sample where `active`."""
        options: dict[str, Any] = {"core": core, "state": state, "gate": gate}
        if active is not None:
            held = state.key.dtype
            with without_autocast(query.device.type):
                out = self._attend(
                    query.to(held), key.to(held), value.to(held), masked_step, active=active[:, 0],
                    **options,
                )  # fmt: skip
            return out.to(query.dtype), state
        options["cu_seqlens"] = bounds
        if state is None:
            return self._attend(query, key, value, return_state=True, **options)
        held = state.key.dtype
        with without_autocast(query.device.type):
            out, state = self._attend(
                query.to(held), key.to(held), value.to(held), return_state=True, state_out=state,
                **options,
            )  # fmt: skip
        return out.to(query.dtype), state

    def _consume(self, core, state, key: Tensor, value: Tensor, counts: Tensor):
        """The state after the first `counts` (B,) of these tokens."""
        mask = torch.arange(key.shape[2], device=key.device) < counts[:, None]
        key, value = (x.transpose(1, 2)[mask].transpose(0, 1)[None] for x in (key, value))
        if not key.shape[2]:
            return state
        bounds = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        query = torch.zeros_like(key).repeat(1, self.num_heads // self.num_kv_heads, 1, 1)
        gate = None if self.gate is None else torch.ones_like(query[..., :1])
        return self._decode(core, query, key, value, state, gate, bounds)[1]

    def _rotated(self, query: Tensor, key: Tensor, angles) -> tuple[Tensor, Tensor]:
        turned = apply_rotary(query, angles), apply_rotary(key, angles)
        if self.rotary_dim < self.head_dim:
            return turned
        # scores read the rotated half, landmarks route by the other: content without position
        return torch.cat([turned[0], torch.zeros_like(query)], -1), torch.cat([turned[1], key], -1)

    def _positions(self, x, key_mask, cu_seqlens, cache) -> Tensor:
        """Number of tokens that take part before each token, (B | 1, N) or packed."""
        if cu_seqlens is not None:
            return packed_places(cu_seqlens, x.shape[1])
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

    def _core(self, cache: StateCache) -> Tensor | None:
        """Core of the landmarks as they were when the cache began."""
        if self.merge != "slots" and cache.core is None:
            kind = "softmax" if self.merge == "gate" else "kernel"
            scale = 1.0 / math.sqrt(self.head_dim)
            cache.core = landmark_core(self.landmarks, scale=scale, kind=kind)
        return cache.core

    def extra_repr(self) -> str:
        marks = self.landmarks.shape[1]
        return f"{self._repr('window', 'merge', 'rotary', 'rotary_dim')}, landmarks={marks}"


def _is_step(x: Tensor, key_mask: Tensor, cache: StateCache | None) -> bool:
    """Whether samples have one token or none, where asking which of them would be a wait."""
    if cache is None or cache.state is None or x.shape[1] != 1:
        return False
    return not readable(key_mask) and not is_sharded(x)


def _rows(key_mask: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, D) of the packed tokens (1, H, T, D) that `key_mask` (B, N) lets take part."""
    rows = []
    for x in packed:
        tokens = x[0].transpose(0, 1)
        out = tokens.new_zeros(*key_mask.shape, *tokens.shape[1:])
        out[key_mask] = tokens
        rows.append(out.transpose(1, 2))
    return tuple(rows)
