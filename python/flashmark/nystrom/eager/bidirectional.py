"""Nyström without causality: every query reads the same states (L, R), over all visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.nystrom.eager.backward import (
    add_,
    empty_gradients,
    landmark_gradients,
    query_gradients,
)
from flashmark.nystrom.eager.chunks import NEG_INF, Setup
from flashmark.nystrom.eager.forward import exp_difference, held_mass, read_landmarks

PIECE = 2048  # tokens of a pass: bounds the temporaries


def bidirectional_forward(
    query, key, value, landmark_queries, landmark_keys, core, key_mask, L0, R0, scale, normalize
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, L_end, R_end) of `nystrom.eager.interface.forward` with is_causal=False, unpacked."""
    call = Setup(query, key, value, landmark_queries, landmark_keys, core, scale, normalize)
    L, R = landmark_states(call, key, value, key_mask, L0, R0)
    held = all_mass(call, L)
    out = query.new_empty(*query.shape[:3], call.dim_v)
    for part in pieces(query.shape[2]):
        queries = grouped(call, query[:, :, part])
        W = read_landmarks(call, queries, queries.shape[2], held).W
        out[:, :, part] = (W.view(*queries.shape[:3], call.marks) @ R).view(*out[:, :, part].shape)
    return out, L, R


def bidirectional_backward(
    dout, dL_end, dR_end, query, key, value, landmark_queries, landmark_keys, core, key_mask,
    L0, R0, scale, normalize,
):  # fmt: skip
    """Gradients of the same, in the order of the interface."""
    call = Setup(query, key, value, landmark_queries, landmark_keys, core, scale, normalize)
    L, R = landmark_states(call, key, value, key_mask, L0, R0)
    held = all_mass(call, L)
    grads = empty_gradients(call)
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
    G = torch.zeros_like(R) if dR_end is None else dR_end.to(call.dtype).clone()
    dL = torch.zeros_like(L) if dL_end is None else dL_end.to(call.dtype).clone()
    for part in pieces(query.shape[2]):
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
    for part in pieces(key.shape[2]):
        keys, values, scores = visible(call, key[:, :, part], value[:, :, part], key_mask, part)
        D = exp_difference(scores, L.unsqueeze(-2))
        ds = D * (values @ G.mT - g.unsqueeze(-2))
        add_(grads["lq"], ds.mT @ keys)
        dkey[:, :, part], dvalue[:, :, part] = ds @ call.lq, D @ G
    dlq, dlk, dcore = landmark_gradients(call, grads, landmark_queries, landmark_keys, core)
    dL0 = dR0 = None
    if L0 is not None:
        start_L, start_R = call.incoming(L0, R0, call.batch)
        kept = exp_difference(start_L, L)
        dL0 = (kept * ((G * start_R).sum(-1) - g)).to(L0.dtype)
        dR0 = (kept.unsqueeze(-1) * G).to(R0.dtype)
    return dquery, dkey, dvalue, dlq, dlk, dcore, None, dL0, dR0


def pieces(length: int) -> list[slice]:
    return [slice(t, min(t + PIECE, length)) for t in range(0, length, PIECE)]


def grouped(call: Setup, x: Tensor) -> Tensor:
    """Query-side rows, the group's heads under each other: (B, H, group * n, *)."""
    return x.to(call.dtype).unflatten(1, (call.heads, call.group)).flatten(2, 3)


def visible(call: Setup, key, value, key_mask, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and scores (B, H, n, M); what the mask hides is zero, and -inf in the scores."""
    key, value = key.to(call.dtype), value.to(call.dtype)
    if key_mask is None:
        return key, value, key @ call.lq.mT
    hidden = ~key_mask[:, None, part, None]
    key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    return key, value, (key @ call.lq.mT).masked_fill_(hidden, NEG_INF)


def landmark_states(call: Setup, key, value, key_mask, L0, R0) -> tuple[Tensor, Tensor]:
    """L and R over the incoming state and all visible keys."""
    L, R = call.incoming(L0, R0, call.batch)
    L, R = L.clone(), R.clone()
    for part in pieces(key.shape[2]):
        _, values, scores = visible(call, key[:, :, part], value[:, :, part], key_mask, part)
        own = torch.logsumexp(scores, -2)
        own_R = exp_difference(scores, own.unsqueeze(-2)).mT @ values
        L = torch.logaddexp(L, own)
        R = torch.lerp(R, own_R, exp_difference(own, L).unsqueeze(-1))
    return L, R


def all_mass(call: Setup, L: Tensor) -> Tensor | None:
    return held_mass(L - call.half).view(-1, 1, 1, call.marks) if call.mass else None
