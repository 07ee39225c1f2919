"""Nyström without causality: every query reads the same states (L, R), over all visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.nystrom.call import Call, Grads, Saved
from flashmark.nystrom.eager.backward import (
    add_,
    empty_gradients,
    landmark_gradients,
    query_gradients,
)
from flashmark.nystrom.eager.chunks import NEG_INF, Setup
from flashmark.nystrom.eager.forward import exp_difference, held_mass, read_landmarks

PASS = 2048  # tokens at a time: bounds the temporaries


def bidirectional_forward(given: Call) -> Saved:
    """Outputs of a call with is_causal=False, not packed."""
    call, query = Setup(given), given.query
    L, R = landmark_states(call)
    held = all_mass(call, L)
    out = query.new_empty(*query.shape[:3], call.dim_v)
    for part in passes(query.shape[2]):
        queries = grouped(call, query[:, :, part])
        W = read_landmarks(call, queries, queries.shape[2], held).W
        out[:, :, part] = (W.view(*queries.shape[:3], call.marks) @ R).view(*out[:, :, part].shape)
    return Saved(out, L, R)


def bidirectional_backward(given: Call, dout: Tensor, dL_end, dR_end) -> Grads:
    """Gradients of such a call."""
    call, query, key, value = Setup(given), given.query, given.key, given.value
    L, R = landmark_states(call)
    held = all_mass(call, L)
    grads = empty_gradients(call)
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
    G = torch.zeros_like(R) if dR_end is None else dR_end.to(call.dtype).clone()
    dL = torch.zeros_like(L) if dL_end is None else dL_end.to(call.dtype).clone()
    for part in passes(query.shape[2]):
        queries, dout_rows = (grouped(call, x[:, :, part]) for x in (query, dout))
        reading = read_landmarks(call, queries, queries.shape[2], held)
        W = reading.W.view(*queries.shape[:3], call.marks)
        dW = centre = dout_rows @ R.mT
        if call.mass:
            centre = (W * dW).sum(-1, keepdim=True)
            dL += (W * (dW - centre)).sum(2)
        G += W.mT @ dout_rows
        rows = queries.shape[2]
        dW, centre = call.mats(dW, rows), call.mats(centre, rows)
        dq = query_gradients(call, reading, dW, centre, queries, grads)
        dquery[:, :, part] = dq.view(*dquery[:, :, part].shape)

    g = (G * R).sum(-1) - dL  # ds_lj = e^{s_lj - L_l} (G_l . v_j - g_l)
    for part in passes(key.shape[2]):
        keys, values, scores = visible(call, part)
        D = exp_difference(scores, L.unsqueeze(-2))
        ds = D * (values @ G.mT - g.unsqueeze(-2))
        add_(grads["lq"], ds.mT @ keys)
        dkey[:, :, part], dvalue[:, :, part] = ds @ call.lq, D @ G
    landmarks = landmark_gradients(call, grads)
    dL0 = dR0 = None
    if given.L0 is not None and given.R0 is not None:
        start_L, start_R = call.incoming()
        kept = exp_difference(start_L, L)
        dL0 = (kept * ((G * start_R).sum(-1) - g)).to(given.L0.dtype)
        dR0 = (kept.unsqueeze(-1) * G).to(given.R0.dtype)
    return Grads(dquery, dkey, dvalue, *landmarks, None, dL0, dR0)


def passes(length: int) -> list[slice]:
    return [slice(t, min(t + PASS, length)) for t in range(0, length, PASS)]


def grouped(call: Setup, x: Tensor) -> Tensor:
    """Query-side rows, the group's heads under each other: (B, H, group * n, *)."""
    return x.to(call.dtype).unflatten(1, (call.heads, call.group)).flatten(2, 3)


def visible(call: Setup, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and scores (B, H, n, M); what the mask hides is zero, and -inf in the scores."""
    given, key_mask = call.call, call.call.key_mask
    key, value = (x[:, :, part].to(call.dtype) for x in (given.key, given.value))
    if key_mask is None:
        return key, value, key @ call.lq.mT
    hidden = ~key_mask[:, None, part, None]
    key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    return key, value, (key @ call.lq.mT).masked_fill_(hidden, NEG_INF)


def landmark_states(call: Setup) -> tuple[Tensor, Tensor]:
    """L and R over the incoming state and all visible keys."""
    L, R = (x.clone() for x in call.incoming())
    for part in passes(call.tokens):
        _, values, scores = visible(call, part)
        own = torch.logsumexp(scores, -2)
        own_R = exp_difference(scores, own.unsqueeze(-2)).mT @ values
        L = torch.logaddexp(L, own)
        R = torch.lerp(R, own_R, exp_difference(own, L).unsqueeze(-1))
    return L, R


def all_mass(call: Setup, L: Tensor) -> Tensor | None:
    return held_mass(L - call.half).view(-1, 1, 1, call.marks) if call.mass else None
