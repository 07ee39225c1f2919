"""Checks of the arguments that hybrid attention alone has, and the backends it is made of."""

from __future__ import annotations

from torch import Tensor

from flashmark.arguments import check_same, check_tensor, one_or
from flashmark.dispatch import choose_backend

MERGES = ("slots", "mass", "gate")


def check_window(window) -> int:
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an int >= 1, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected an int >= 1, got {window}")
    return window


def check_merge(merge, gate, core, landmarks, query) -> None:
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
        return
    check_tensor("gate", gate, 4)
    check_same("gate", gate, dtype=None, device=query.device)
    shape = (*query.shape[:3], 1)
    if not all(map(one_or, gate.shape, shape)):
        raise ValueError(f"gate: expected broadcastable to {shape}, got {tuple(gate.shape)}")


def backends_of(backend: str, merge: str, query: Tensor, marks: int) -> tuple[str, str]:
    """What runs the near field, and the far one."""
    near = choose_backend("block_sparse", backend, query)
    if near == "reference":
        return near, near
    if merge == "slots":
        slots = "eager" if near == "cpu" else backend
        return near, choose_backend("hybrid", slots, query, landmarks=marks)
    far = choose_backend("nystrom", backend, query)
    if merge == "mass" and far == "triton":  # states are Nyström's, what reads them is not
        far = choose_backend("hybrid", backend, query, landmarks=marks)
    return near, far
