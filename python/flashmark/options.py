"""Keyword arguments of the operators, for type checkers: what overloads of one function share."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from flashmark.nystrom import NystromState

Landmarks = Tensor | tuple[Tensor, Tensor]


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
