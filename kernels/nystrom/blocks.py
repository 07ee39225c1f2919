"""A call cut into blocks, of landmarks and of columns of values, and its results put together.

The state of a landmark concerns no other, and a column of the output depends on the same column of
the values alone. Queries read all landmarks: W of a block is softmax(q . k~) times the core's
columns of that block, an attention whose values are rows of the core. So outputs of blocks of
landmarks add up, and gradients add up, each at its place in the whole. With normalize="mass" what
adds up are numerators and masses, and rows are divided in the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from . import arguments as args
from . import configs

Forward = Callable[[args.Inputs], args.Outputs]


def landmark_blocks(call: args.Inputs) -> list[tuple[slice, args.Inputs]]:
    """As few blocks as can be, all but the last of the same size."""
    marks = call.marks.lq.shape[-2]
    count = triton.cdiv(marks, configs.marks_at_once(call.query.device, call.query.dtype))
    step = triton.cdiv(marks, count)
    if count == 1:
        return [(slice(None), call)]
    blocks = (slice(first, first + step) for first in range(0, marks, step))
    return [(own, _only(call, own, n, count, step)) for n, own in enumerate(blocks)]


def _only(call: args.Inputs, own: slice, block: int, blocks: int, step: int) -> args.Inputs:
    marks = call.marks
    marks = marks._replace(
        lq=marks.lq[..., own, :],
        core=marks.core[..., own],
        decay=None if marks.decay is None else marks.decay[:, own],
        half2=None if marks.half2 is None else marks.half2[..., own],
    )
    L0, R0 = call.L0, call.R0
    if L0 is not None:
        L0, R0 = L0[..., own].contiguous(), R0[..., own, :].contiguous()
    return call._replace(marks=marks, L0=L0, R0=R0, block=block, blocks=blocks, step=step)


def forward(run: Forward, call: args.Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out, L_end, R_end) of any number of landmarks."""
    parts = [run(block) for _, block in landmark_blocks(call)]
    if len(parts) == 1:
        return parts[0].out, parts[0].ends.L, parts[0].ends.R
    out, _ = _added(parts)
    L = torch.cat([part.ends.L for part in parts], -1)
    return out.to(call.query.dtype), L, torch.cat([part.ends.R for part in parts], -2)


def _added(parts: list[args.Outputs]) -> tuple[Tensor, args.Masses | None]:
    """(out, what its rows were divided by) of all landmarks."""
    if parts[0].masses is None:
        out = parts[0].out
        for part in parts[1:]:
            out += part.out
        return out, None
    tops = torch.stack([part.masses.top for part in parts])
    top = tops.amax(0)
    unseen = top == -torch.inf
    top = top.masked_fill(unseen, 0.0)
    units = torch.exp2(tops - top)
    mass, out = torch.zeros_like(top), torch.zeros_like(parts[0].out)
    for part, unit in zip(parts, units, strict=True):
        mass += part.masses.mass * unit
        out += part.out * unit.unsqueeze(-1)
    mass = mass.masked_fill(unseen, 1.0)
    return out / mass.unsqueeze(-1), args.Masses(top, mass, None)


def backward(
    sweep: Callable, run: Forward, call: args.Inputs, dout: Tensor, dL: Tensor | None,
    dR: Tensor | None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Gradients of a call of any number of landmarks and of columns of values.

    `sweep` computes those of one block of both. "half", of s_ll / 2, is passed on to landmarks.
    """
    width, columns = args.choose_config("rows", call).block_v, call.value.shape[3]
    if columns <= width and len(landmark_blocks(call)) == 1:
        return _through_half(call, sweep(call, dout, dL, dR, None, wide=False))
    sums = _zeros(call)
    for v0 in range(0, columns, width):
        cols = slice(v0, v0 + width)
        narrow = call._replace(value=call.value[..., cols])
        if call.R0 is not None:
            narrow = narrow._replace(R0=call.R0[..., cols].contiguous())
        blocks = landmark_blocks(narrow)
        masses = None
        if call.mass and len(blocks) > 1:
            out, masses = _added([run(block) for _, block in blocks])
            delta = (dout[..., cols].float() * out).sum(-1)
            masses = masses._replace(delta=delta)
        for own, block in blocks:
            grads = sweep(
                block, dout[..., cols], dL[..., own] if v0 == 0 and dL is not None else None,
                None if dR is None else dR[..., own, cols], masses, wide=True,
            )  # fmt: skip
            places = {
                "value": (..., cols), "lq": (..., own, slice(None)), "core": (..., own),
                "decay": (..., own), "L0": (..., own), "R0": (..., own, cols),
            }  # fmt: skip
            for name, grad in grads.items():
                sums[name][places.get(name, ...)] += grad
    return _through_half(call, sums)


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


def _through_half(call: args.Inputs, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the gradient of s_ll / 2 to those of the landmarks."""
    pull = grads.pop("half", None)
    if pull is not None:
        pull = pull.unsqueeze(-1) * (0.5 * call.marks.scale)
        grads["lq"] = grads["lq"] + pull * call.marks.lk.float()
        grads["lk"] = grads["lk"] + pull * call.marks.lq.float()
    return grads
