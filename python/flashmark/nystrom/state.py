"""The state that causal Nyström attention keeps of the tokens it has consumed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class NystromState(NamedTuple):
    """All that causal Nyström attention keeps of the tokens it has consumed, at the last of them.

    Its size does not depend on their number. Both tensors are float32 (float64 for float64 inputs)
    and carry gradients.
    """

    L: Tensor  # (B, Hkv, M): log of the mass under each landmark; -inf where nothing is held
    R: Tensor  # (B, Hkv, M, Dv): mean of the values under each landmark

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        landmarks: int,
        v_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> NystromState:
        """The state before any token: L = -inf, R = 0."""
        shape = batch, kv_heads, landmarks
        L = torch.full(shape, -math.inf, dtype=dtype, device=device)
        return cls(L, torch.zeros(*shape, v_dim, dtype=dtype, device=device))

    def merge(
        self, right: NystromState, length: int | Tensor, decay: Tensor | None = None
    ) -> NystromState:
        """The state after `self`'s tokens and then `right`'s; associative.

        Args:
            right: the state of the later tokens, computed from an empty state.
            length: how many tokens `right` consumed, masked ones included.
            decay: (Hkv, M) per token, as in the attention.
        """
        left_L = self.L if decay is None else self.L - decay.to(self.L.dtype) * length
        empty = (left_L == -math.inf) & (right.L == -math.inf)
        both = torch.logaddexp(left_L.masked_fill(empty, 0.0), right.L.masked_fill(empty, 0.0))
        from_left, from_right = (
            torch.exp(x - both).masked_fill(empty, 0.0).unsqueeze(-1) for x in (left_L, right.L)
        )
        R = from_left * self.R + from_right * right.R
        return NystromState(both.masked_fill(empty, -math.inf), R)


torch.serialization.add_safe_globals([NystromState])  # for torch.load, weights_only=True
