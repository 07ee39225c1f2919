"""The backward of a call whose values are wider than a program holds: a slice of columns at a time.

A column of the output depends on the same column of the values alone, so that the gradients of all
else are sums over the slices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import arguments as args


def backward(
    sweep: Callable, call: args.Inputs, dout: Tensor, dL: Tensor | None, dR: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of a call by `sweep`, which computes those of one slice of columns.

    "half", of s_ll / 2, is passed on to landmarks.
    """
    width, columns = args.choose_config("rows", call).block_v, call.value.shape[3]
    if columns <= width:
        return through_half(call, sweep(call, dout, dL, dR, wide=False))
    sums = _zeros(call)
    for v0 in range(0, columns, width):
        cols = slice(v0, v0 + width)
        narrow = call._replace(value=call.value[..., cols])
        if call.R0 is not None:
            narrow = narrow._replace(R0=call.R0[..., cols].contiguous())
        grads = sweep(
            narrow, dout[..., cols], dL if v0 == 0 else None,
            None if dR is None else dR[..., cols], wide=True,
        )  # fmt: skip
        for name, grad in grads.items():
            sums[name][(..., cols) if name in ("value", "R0") else ...] += grad
    return through_half(call, sums)


def _zeros(call: args.Inputs) -> dict[str, Tensor]:
    batch, (_, heads, _, dim), marks = call.key.shape[0], call.key.shape, call.marks.lk.shape[-2]
    shapes = {
        "query": call.query.shape, "key": call.key.shape, "value": call.value.shape,
        "lq": (batch, heads, marks, dim), "lk": (batch, heads, marks, dim),
        "core": (batch, heads, marks, marks), "decay": (heads, marks),
    }  # fmt: skip
    if call.mass:
        shapes["half"] = batch, heads, marks
    if call.L0 is not None:
        shapes |= {"L0": call.L0.shape, "R0": call.R0.shape}
    new = dict(dtype=torch.float32, device=call.query.device)
    return {name: torch.zeros(shape, **new) for name, shape in shapes.items()}


def through_half(call: args.Inputs, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the gradient of s_ll / 2 to those of the landmarks."""
    pull = grads.pop("half", None)
    if pull is not None:
        pull = pull.unsqueeze(-1) * (0.5 * call.marks.scale)
        grads["lq"] = grads["lq"] + pull * call.marks.lk.float()
        grads["lk"] = grads["lk"] + pull * call.marks.lq.float()
    return grads
