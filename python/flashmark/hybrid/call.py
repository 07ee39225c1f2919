"""One description of a call of hybrid attention: what validation makes and backends take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from flashmark.arguments import check_count, check_same, one_or
from flashmark.dispatch import choose_backend

if TYPE_CHECKING:
    from flashmark.hybrid.state import HybridState

MERGES = ("slots", "mass", "gate")


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """All checked arguments, in the order of the operator's schema."""

    query: Tensor  # (B, Hq, N, D), like key and value with stride 1 in the last dimension
    key: Tensor  # (B, Hkv, N, D)
    value: Tensor  # (B, Hkv, N, Dv)
    landmark_queries: Tensor  # (Hkv, M, D) or (B, Hkv, M, D)
    landmark_keys: Tensor  # the same tensor where landmarks are tied
    window: int
    merge: str
    scale: float
    core: Tensor | None = None  # (Hkv, M, M) or (B, Hkv, M, M); None for merge="slots" alone
    gate: Tensor | None = None  # broadcastable to (B, Hq, N, 1); for merge="gate" alone
    key_mask: Tensor | None = None  # bool (B, N)
    cu_seqlens: Tensor | None = None  # int32 (S + 1,)
    # the tensors of a HybridState, all of them or none; far_keys for merge="slots" alone
    position: Tensor | None = None
    keep: Tensor | None = None
    held_keys: Tensor | None = None
    held_values: Tensor | None = None
    far_counts: Tensor | None = None
    far_keys: Tensor | None = None
    far_values: Tensor | None = None
    return_state: bool = False


class Options(TypedDict, total=False):
    """Keyword arguments of the public function, for type checkers."""

    merge: str
    gate: Tensor | None
    core: Tensor | None
    scale: float | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    state: HybridState | None
    state_out: HybridState | None
    backend: str


def check_window(window) -> int:
    return check_count("window", window)


def check_merge(merge, gate, core, landmarks, query) -> Tensor | None:
    """The gate, in four dimensions."""
    if merge not in MERGES:
        raise ValueError(f"merge: expected 'slots', 'mass' or 'gate', got {merge!r}")
    if (gate is None) == (merge == "gate"):
        wanted = "a tensor" if merge == "gate" else "None"
        got = "None" if gate is None else "a tensor"
        raise ValueError(f"gate: expected {wanted} with merge={merge!r}, got {got}")
    if core is not None and merge == "slots":
        raise ValueError("core: expected None with merge='slots', got a tensor")
    if merge == "mass" and isinstance(landmarks, tuple | list):
        raise ValueError("landmarks: expected one tensor with merge='mass', got a pair")
    if gate is None:
        return None
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate: expected a tensor, got {type(gate).__name__}")
    check_same("gate", gate, dtype=None, device=query.device)
    shape = (*query.shape[:3], 1)
    whole = gate[(None,) * (4 - gate.dim())] if gate.dim() < 4 else gate
    if whole.dim() > 4 or not all(map(one_or, whole.shape, shape)):
        raise ValueError(f"gate: expected broadcastable to {shape}, got {tuple(gate.shape)}")
    return whole


def parts_of(backend: str, merge: str, query: Tensor, marks: int) -> tuple[str, str]:
    """Backends of the near field and of the far one, where a call is made of several operators.

    C++ runs whole calls only without gradients. With gradients the near field runs in C++, and the
    dense products with landmarks in PyTorch.
    """
    near = choose_backend("block_sparse", backend, query)
    if near in ("reference", "cpu"):
        return near, "eager"
    far = "eager"
    if merge != "slots":
        reads = merge == "gate" and torch.is_grad_enabled()  # by Nyström's kernels, then backward
        far = choose_backend("nystrom", backend, query, landmarks=marks, gradients=reads)
    if merge == "slots" or (merge == "mass" and far == "triton"):  # its reader is not Nyström's
        far = choose_backend("hybrid", backend, query, landmarks=marks)
    return near, far
