"""The definition of hybrid attention, exact nearby and through landmarks afar, densely."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from flashmark.reference.nystrom import landmark_core

NEG_INF = float("-inf")
LEAST_OCCUPANCY = 1e-30  # a slot that holds less is empty


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    window: int,
    merge: str = "slots",
    gate: Tensor | None = None,
    core: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: tuple[tuple[Tensor, Tensor, Tensor], ...] | None = None,
    return_state: bool = False,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]:
    """Exact near field and landmark far field, as `flashmark.hybrid_attention`, computed densely.

    All computation is in the dtype of `query`. The state forgets nothing: for each sample (each
    packed sequence) all its keys (Hkv, P, D), values (Hkv, P, Dv) and which of them are visible
    (P,), so samples may be at different positions.
    """
    batch, heads, length, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    pair = (landmarks, landmarks) if isinstance(landmarks, Tensor) else landmarks
    if core is None and merge != "slots":
        wide = [x.to(torch.promote_types(query.dtype, torch.float32)) for x in pair]
        kind = "mass" if merge == "mass" else "landmark"
        core = landmark_core(wide[0], None if pair[0] is pair[1] else wide[1], scale, kind)
    if gate is not None:
        gate = gate.to(query.dtype).expand(batch, heads, length, 1)
    if key_mask is None:
        key_mask = torch.ones(batch, length, dtype=torch.bool, device=query.device)

    streams = [(b, slice(0, length)) for b in range(batch)]
    if cu_seqlens is not None:
        streams = [(0, slice(*bounds)) for bounds in itertools.pairwise(cu_seqlens.tolist())]
    outs, states = [], []
    for s, (b, tokens) in enumerate(streams):
        seen = key[b, :, tokens], value[b, :, tokens], key_mask[b, tokens]
        if state is not None:
            seen = tuple(
                torch.cat([old.to(new.dtype), new], dim=-1 if new.dim() == 1 else 1)
                for old, new in zip(state[s], seen, strict=True)
            )
        own = [
            None if x is None else (x[b] if x.dim() == 4 else x).to(query.dtype)
            for x in (*pair, core)
        ]
        own_gate = None if gate is None else gate[b, :, tokens]
        outs.append(_one_stream(query[b, :, tokens], *seen, *own, own_gate, window, merge, scale))
        states.append(seen)
    if not outs:
        out = query.new_zeros(batch, heads, length, value.shape[-1])
    else:
        out = torch.stack(outs) if cu_seqlens is None else torch.cat(outs, dim=1)[None]
    return (out, tuple(states)) if return_state else out


def _one_stream(query, key, value, visible, lq, lk, core, gate, window, merge, scale) -> Tensor:
    """query (Hq, N, D) holds the last N of the T tokens of key (Hkv, T, D), value (Hkv, T, Dv) and
    visible (T,)."""
    length, kv_heads, total = query.shape[1], *key.shape[:2]
    key, value = (x.masked_fill(~visible[:, None], 0.0) for x in (key, value))
    query = query.unflatten(0, (kv_heads, -1))  # (Hkv, group, N, D)
    time = torch.arange(total, device=query.device)
    i, j = time[total - length :, None], time
    sees = visible & (j <= i)
    near, far = sees & (i // window - j // window <= 1), sees & (i // window - j // window >= 2)

    near_scores = (scale * query @ key[:, None].mT).masked_fill(~near, NEG_INF)
    routes = scale * lq @ key.mT  # (Hkv, M, T)
    if merge == "slots":
        # a_lj = softmax over l; slot l of row i is the mean of the far keys under a_l
        a = torch.softmax(routes, -2)[:, None] * far[:, None]  # (Hkv, N, M, T)
        n = a.sum(-1)  # (Hkv, N, M)
        empty = n < max(LEAST_OCCUPANCY, torch.finfo(n.dtype).tiny)  # float16 has no 1e-30
        n = n.masked_fill(empty, 1.0)
        slot_key, slot_value = (a @ x[:, None] / n[..., None] for x in (key, value))
        slot_scores = torch.einsum("hgnd,hnmd->hgnm", scale * query, slot_key) + n.log()[:, None]
        slot_scores = slot_scores.masked_fill(empty[:, None], NEG_INF)
        weights, _ = _softmax(torch.cat([near_scores, slot_scores], -1))
        out = weights[..., :total] @ value[:, None]
        out = out + torch.einsum("hgnm,hnmd->hgnd", weights[..., total:], slot_value)
        return out.flatten(0, 1)

    near_weights, near_lse = _softmax(near_scores)
    near_out = near_weights @ value[:, None]  # (Hkv, group, N, Dv)
    # R_l, L_l: mean of the values and log of the mass under landmark l, over the far keys of row i
    far_weights, L = _softmax(routes[:, None].masked_fill(~far[:, None], NEG_INF))
    R = far_weights @ value[:, None]  # (Hkv, N, M, Dv)
    L = L.squeeze(-1)
    unseen = ~far.any(-1, keepdim=True)  # (N, 1)
    reading = scale * query @ lk[:, None].mT  # (Hkv, group, N, M)
    if merge == "gate":
        W = torch.softmax(reading, -1) @ core[:, None]
        far_out = torch.einsum("hgnm,hnmd->hgnd", W, R)
        g = gate.unflatten(0, (kv_heads, -1)).masked_fill(unseen, 1.0)
        return (g * near_out + (1 - g) * far_out).flatten(0, 1)

    # "mass": exp(q . k) = sum_l G_l exp(q~_l . k), scaled so that S has a unit diagonal
    half = 0.5 * scale * (lq * lk).sum(-1)  # (Hkv, M)
    reading = reading - half[:, None, None]
    held = (L - half[:, None]).masked_fill(unseen, 0.0)[:, None]
    tops = reading.amax(-1, keepdim=True), held.amax(-1, keepdim=True)
    G = torch.exp(reading - tops[0]) @ core[:, None]
    parts = G * torch.exp(held - tops[1])
    mass = parts.sum(-1, keepdim=True)
    dropped = unseen | (mass <= 0)  # numerator and mass together, with no gradient
    mass = mass.masked_fill(dropped, 1.0)
    far_out = torch.einsum("hgnm,hnmd->hgnd", parts, R) / mass
    far_lse = (mass.log() + tops[0] + tops[1]).masked_fill(dropped, NEG_INF)
    shares, _ = _softmax(torch.cat([near_lse, far_lse], -1))
    far_out = far_out.masked_fill(dropped, 0.0)
    return (shares[..., :1] * near_out + shares[..., 1:] * far_out).flatten(0, 1)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the last dimension, kept; a row of -inf gives zeros and -inf."""
    empty = (scores == NEG_INF).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1, keepdim=True)
    return torch.exp(scores - lse).masked_fill(empty, 0.0), lse.masked_fill(empty, NEG_INF)
