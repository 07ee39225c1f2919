"""Keyword arguments of the operators, for type checkers: what overloads of one function share."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from flashmark.hybrid.state import HybridState
    from flashmark.nystrom import NystromState

Landmarks = Tensor | tuple[Tensor, Tensor]


class BlockSparseOptions(TypedDict, total=False):
    query_offset: int | Tensor | None
    kv_lengths: Tensor | None
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    deterministic: bool | None
    backend: str


class NystromOptions(TypedDict, total=False):
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


class HybridOptions(TypedDict, total=False):
    merge: str
    gate: Tensor | None
    core: Tensor | None
    scale: float | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    state: HybridState | None
    backend: str
