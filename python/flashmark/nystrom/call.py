"""One description of a call of Nyström attention: what validation makes and backends take."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypedDict

from torch import Tensor

from flashmark.nystrom.state import NystromState


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """All checked arguments, in the order of the operator's schema.

    Rows of the states are samples, or packed sequences. L0 and R0 come both or not at all; L0 is
    -inf where nothing is held.
    """

    query: Tensor  # (B, Hq, Nq, D), like key and value with stride 1 in the last dimension
    key: Tensor  # (B, Hkv, Nk, D); Nk == Nq when causal or packed
    value: Tensor  # (B, Hkv, Nk, Dv)
    landmark_queries: Tensor  # (Hkv, M, D) or (B, Hkv, M, D)
    landmark_keys: Tensor  # shaped alike; tied landmarks come twice
    core: Tensor  # (Hkv, M, M) or (B, Hkv, M, M)
    scale: float
    decay: Tensor | None = None  # (Hkv, M)
    key_mask: Tensor | None = None  # bool (B, Nk), True = takes part
    cu_seqlens: Tensor | None = None  # int32 (S + 1,), B = 1
    L0: Tensor | None = None  # (rows, Hkv, M), state before the first token
    R0: Tensor | None = None  # (rows, Hkv, M, Dv)
    mass: bool = False  # normalize="mass": the core is of S scaled to a unit diagonal
    is_causal: bool = True

    @property
    def rows(self) -> int:
        """Sequences that have a state of their own."""
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Saved(NamedTuple):
    """Outputs of the forward; the backward reads none of them."""

    out: Tensor  # (B, Hq, Nq, Dv), contiguous, in the dtype of query
    L: Tensor  # (rows, Hkv, M), float32 or float64, like R the state after the last token
    R: Tensor  # (rows, Hkv, M, Dv)


class Grads(NamedTuple):
    """Gradients of the fields of a call, in their shapes and dtypes; None where there is no such
    field. Keys that a mask hides get 0.
    """

    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    dlandmark_queries: Tensor
    dlandmark_keys: Tensor
    dcore: Tensor
    ddecay: Tensor | None
    dL0: Tensor | None
    dR0: Tensor | None


class Options(TypedDict, total=False):
    """Keyword arguments of the public function, for type checkers."""

    core: Tensor | None
    is_causal: bool
    scale: float | None
    normalize: str
    decay: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    state: NystromState | None
    state_out: NystromState | None
    backend: str
