"""Nyström attention in plain PyTorch, on every device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashmark.nystrom.call import Call, Grads, Saved
from flashmark.nystrom.eager.backward import causal_backward
from flashmark.nystrom.eager.bidirectional import bidirectional_backward, bidirectional_forward
from flashmark.nystrom.eager.forward import causal_forward


def forward(call: Call) -> Saved:
    if not call.query.shape[0]:
        return _no_samples(call)
    if call.is_causal:
        return causal_forward(call)
    if call.cu_seqlens is None:
        return bidirectional_forward(call)
    outs, L, R = zip(*(bidirectional_forward(x) for _, x in _sequences(call)), strict=True)
    return Saved(torch.cat(outs, 2), torch.cat(L), torch.cat(R))


def backward(call: Call, saved: Saved, dout: Tensor, dL: Tensor | None, dR: Tensor | None) -> Grads:
    if not call.query.shape[0]:
        return _no_gradients(call)
    if call.is_causal:
        return causal_backward(call, dout, dL, dR)
    if call.cu_seqlens is None:
        return bidirectional_backward(call, dout, dL, dR)
    parts = []
    for s, (place, sequence) in enumerate(_sequences(call)):
        ends = (None if x is None else x[s : s + 1] for x in (dL, dR))
        parts.append(bidirectional_backward(sequence, dout[:, :, place], *ends))
    dq, dk, dv, dlq, dlk, dcore, _, dL0, dR0 = zip(*parts, strict=True)
    starts = (None, None) if call.L0 is None else (torch.cat(dL0), torch.cat(dR0))
    tokens = (torch.cat(x, 2) for x in (dq, dk, dv))
    return Grads(*tokens, sum(dlq), sum(dlk), sum(dcore), None, *starts)


def _sequences(call: Call) -> Iterator[tuple[slice, Call]]:
    """The tokens of each packed sequence, and a call with them alone."""
    bounds = call.cu_seqlens.tolist()  # type: ignore[union-attr]
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        place = slice(start, stop)
        yield place, dataclasses.replace(
            call, query=call.query[:, :, place], key=call.key[:, :, place],
            value=call.value[:, :, place], cu_seqlens=None,
            key_mask=None if call.key_mask is None else call.key_mask[:, place],
            L0=None if call.L0 is None else call.L0[s : s + 1],
            R0=None if call.R0 is None else call.R0[s : s + 1],
        )  # fmt: skip


def _no_samples(call: Call) -> Saved:
    query, dtype = call.query, torch.promote_types(call.query.dtype, torch.float32)
    L = query.new_zeros(call.rows, call.key.shape[1], call.core.shape[-1], dtype=dtype)
    out = query.new_empty(*query.shape[:3], call.value.shape[3])
    return Saved(out, L, L.new_empty(*L.shape, call.value.shape[3]))


def _no_gradients(call: Call) -> Grads:
    fields = (getattr(call, name[1:]) for name in Grads._fields)
    return Grads(*(None if x is None else x.new_zeros(x.shape) for x in fields))
