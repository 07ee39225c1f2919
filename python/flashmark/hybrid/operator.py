"""The operators of hybrid attention.

`flashmark::hybrid_forward.cpu` and `flashmark::hybrid_update.cpu` are whole calls without gradients
in C++; the second moves the state of the call on in place, as `flashmark::hybrid_update.triton`
does, which takes one token a sample. All other calls are composed of block-sparse attention,
Nyström attention and the operators of `flashmark.hybrid.far_field`.
"""

from __future__ import annotations

import dataclasses
import importlib
import re

import torch
from torch import Tensor

from flashmark.autograd import needs_gradient, transformed
from flashmark.flops import FORMULAS, register_if_counting
from flashmark.hybrid import composition
from flashmark.hybrid.call import Call
from flashmark.hybrid.state import HybridState, shapes, tensors_of
from flashmark.library import overload, schema_of

_FIELDS = [field.name for field in dataclasses.fields(Call)]
_STATE = ("position", "keep", "held_keys", "held_values", "far_counts", "far_keys", "far_values")
_DIFFERENTIABLE = [
    n for n, name in enumerate(_FIELDS)
    if name not in ("window", "merge", "scale", "key_mask", "cu_seqlens", "return_state")
    and name not in _STATE[:2]
]  # fmt: skip


def run(call: Call, parts: tuple[str, str], state_out: HybridState | None):
    """(out, state | None), differentiable where an argument needs a gradient."""
    if not torch.compiler.is_compiling():
        register_if_counting()
    flat = tuple([getattr(call, name) for name in _FIELDS])
    # gradients of an exported program pass no operator, and this one fits every length
    exported = parts[0] == "cpu" and torch.compiler.is_exporting()
    follows = transformed() or not exported and needs_gradient(flat, _DIFFERENTIABLE)
    if parts[0] != "cpu" or follows:
        if _is_step(call, parts, state_out) and not follows:
            return _step(*flat, None), state_out
        out, state = composition.run(call, parts)
    elif state_out is not None and _in_place(call, state_out):
        return _update(*flat), state_out
    else:
        out, *tensors = _forward(*flat)
        state = HybridState(*tensors[:4], tuple(tensors[4:])) if tensors else None
    if state_out is None:
        return out, state
    for old, new in zip(tensors_of(state_out), tensors_of(state), strict=True):
        old.copy_(new)
    return out, state_out


def step(call: Call, active: Tensor) -> Tensor:
    """Output of one token a sample by Triton kernels; the state of the call moves on in place.

    Where `active`, bool (B,), is False a sample has no token: its state stays, its output is 0.
    """
    return _step(*(getattr(call, name) for name in _FIELDS), active)


def _is_step(call: Call, parts: tuple[str, str], state_out: HybridState | None) -> bool:
    if parts != ("triton", "triton") or call.cu_seqlens is not None or call.query.shape[2] != 1:
        return False
    return state_out is not None and _in_place(call, state_out)


def _in_place(call: Call, state_out: HybridState) -> bool:
    """Whether the call goes on from `state_out` itself."""
    given = [getattr(call, name) for name in _STATE if name != "far_keys" or call.merge == "slots"]
    return all(x is y for x, y in zip(given, tensors_of(state_out), strict=True))


def _fake_forward(*flat) -> list[Tensor]:
    call = Call(*flat)
    query, key, value = call.query, call.key, call.value
    results = [query.new_empty(*query.shape[:3], value.shape[3])]
    if not call.return_state:
        return results
    rows = key.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    held = rows, key.shape[1], 2 * call.window
    results += [
        key.new_empty(rows, dtype=torch.int64),
        key.new_empty(rows, 2 * call.window, dtype=torch.bool),
        key.new_empty(*held, key.shape[3]),
        key.new_empty(*held, value.shape[3]),
    ]
    far = (rows, key.shape[1], 3, call.landmark_queries.shape[-2])
    wanted = shapes(call.merge, far, key.shape[3], value.shape[3])
    return results + [key.new_empty(shape, dtype=torch.float32) for shape in wanted]


def _fake_update(*flat) -> Tensor:
    return _fake_forward(*flat[:-1], False)[0]


_SCHEMA = schema_of(Call)
_WRITTEN = re.sub(
    rf"Tensor\? ({'|'.join(_STATE)})\b",
    lambda found: f"Tensor({chr(97 + _STATE.index(found[1]))}!)? {found[1]}",
    _SCHEMA,
)
_forward = overload(f"hybrid_forward.cpu({_SCHEMA}) -> Tensor[]", None, _fake_forward)
_update = overload(f"hybrid_update.cpu({_WRITTEN}) -> Tensor", None, _fake_update)


def _run_step(*flat) -> Tensor:
    return importlib.import_module("flashmark.kernels.hybrid").step(Call(*flat[:-1]), flat[-1])


def _fake_step(*flat) -> Tensor:
    return _fake_update(*flat[:-1])


_step = overload(
    f"hybrid_update.triton({_WRITTEN}, Tensor? active) -> Tensor", _run_step, _fake_step
)


def _flops(*flat, **_) -> int:
    """Near keys, 1.5 windows a row; routing and sums; what reads the landmarks."""
    call = Call(*flat)
    (batch, heads, tokens, dim), kv_heads = call.query.shape, call.key.shape[1]
    v_dim, marks = call.value.shape[3], call.landmark_queries.shape[-2]
    slots = call.merge == "slots"
    near = min(3 * call.window // 2, (tokens + 1) // 2) * (dim + v_dim)
    sums = marks * (dim + v_dim + (dim if slots else 0))
    reading = marks * (dim + v_dim + (0 if slots else marks))
    return 2 * batch * tokens * (heads * (near + reading) + kv_heads * sums)


FORMULAS |= {"hybrid_forward": _flops, "hybrid_update": _flops}
