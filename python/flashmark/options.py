"""Keyword arguments of the operators, for type checkers: what overloads of one function share."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from flashmark.hybrid.state import HybridState

Landmarks = Tensor | tuple[Tensor, Tensor]


class HybridOptions(TypedDict, total=False):
    merge: str
    gate: Tensor | None
    core: Tensor | None
    scale: float | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    state: HybridState | None
    backend: str
