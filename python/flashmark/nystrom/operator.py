"""`flashmark::nystrom_forward`, `flashmark::nystrom_backward`, and `flashmark::nystrom_update`: a
forward without gradients that overwrites a state."""

from __future__ import annotations

import importlib

import torch

from flashmark.autograd import transformed
from flashmark.flops import FORMULAS, register_if_counting
from flashmark.library import Operator, overload, schema_of
from flashmark.nystrom.call import Call, Grads, Saved
from flashmark.nystrom.state import NystromState


def _forward_fake(call: Call) -> Saved:
    query, value = call.query, call.value
    dtype = torch.promote_types(query.dtype, torch.float32)
    L = query.new_empty(call.rows, value.shape[1], call.core.shape[-1], dtype=dtype)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return Saved(out, L, L.new_empty(*L.shape, value.shape[3]))


def _flops(call: Call, per_key: tuple[int, ...], per_query: tuple[int, ...]) -> int:
    """The recurrence's products: 2 M times a sum of (D, M, Dv) for every key, and for every query.

    What a backend adds by working in chunks is not counted.
    """
    query, key = call.query, call.key
    widths = query.shape[3], call.core.shape[-1], call.value.shape[3]
    keys = key.shape[0] * key.shape[1] * key.shape[2]
    queries = query.shape[0] * query.shape[1] * query.shape[2]
    key_work, query_work = (
        sum(n * width for n, width in zip(counts, widths, strict=True))
        for counts in (per_key, per_query)
    )
    return 2 * widths[1] * (keys * key_work + queries * query_work)


def _forward_flops(call: Call) -> int:
    """s and R; F, W and out."""
    return _flops(call, (1, 0, 1), (1, 1, 1))


def _backward_flops(call: Call) -> int:
    """s, dk, dq~ and R, G . v, dv; F, dq, dk~ and W, dF, dcore and dW, G."""
    return _flops(call, (3, 0, 3), (3, 3, 2))


OPERATOR = Operator(
    "nystrom",
    Call,
    Saved,
    Grads,
    {
        "eager": "flashmark.nystrom.eager.interface",
        "triton": "flashmark.kernels.nystrom",
        "cpu": None,
    },
    forward_fake=_forward_fake,
    kept=(),
    composed="flashmark.nystrom.composed",
    dims={
        **dict.fromkeys(("query", "key", "value", "out", "R", "R0"), ("BH..",)),
        **dict.fromkeys(("landmark_queries", "landmark_keys", "core"), ("H..", "BH..")),
        **dict.fromkeys(("L", "L0"), ("BH.",)),
        "decay": ("H.",),
        "key_mask": ("B.",),
    },
    unfoldable={"cu_seqlens": "B"},
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)


def _fake_update(*flat):
    return _forward_fake(Call(*flat[:-2])).out


def _update_in_triton(*flat):
    return importlib.import_module("flashmark.kernels.nystrom").update(Call(*flat[:-2]), *flat[-2:])


_update = {
    backend: overload(
        f"nystrom_update.{backend}({schema_of(Call)}, Tensor(a!) L_out, Tensor(b!) R_out) "
        "-> Tensor",
        run,
        _fake_update,
    )
    for backend, run in (("cpu", None), ("triton", _update_in_triton))
}
FORMULAS["nystrom_update"] = lambda *flat, **_: _forward_flops(Call(*flat[:-2]))


def run(call: Call, backend: str, state_out: NystromState | None = None) -> Saved:
    """Outputs of a call, differentiable where an argument needs a gradient. The C++ and the Triton
    kernels write the final states into `state_out`; what comes from other backends is the caller's
    to copy.

    The C++ kernels run along time. Without causality the work is three dense products, which
    backend "cpu" leaves to PyTorch, as `show_config` says.
    """
    if backend == "cpu" and not call.is_causal:
        backend = "eager"
    traced = torch.compiler.is_compiling()
    if state_out is None or backend not in _update or traced or transformed():
        return OPERATOR.run(call, backend)
    register_if_counting()
    L, R = state_out
    return Saved(_update[backend](*OPERATOR.flatten(call), L, R), L, R)
