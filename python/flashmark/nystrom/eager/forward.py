"""Causal Nyström forward: sums of each chunk, a scan over chunks, then all rows of a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.nystrom.call import Call, Saved
from flashmark.nystrom.eager.chunks import NEG_INF, Chunks, Running, Setup, Steep


class Reading(NamedTuple):
    """Features and weights of the query rows of a block: (Z, group * C, M) each."""

    F: Tensor  # softmax over landmarks; "mass": exp of the scaled scores, up to a factor of the row
    W: Tensor  # weights on R: the rows sum to 1
    factor: Tensor | None  # "mass": W = (F core) * factor


def causal_forward(given: Call) -> Saved:
    """Outputs of a call with is_causal=True."""
    query = given.query
    if query.shape[2] == 1 and given.cu_seqlens is None:
        return one_token(Setup(given))
    call = Chunks(given)
    out = call.empty(query[..., :1].expand(*query.shape[:3], call.dim_v))
    carry = None
    for c0, c1 in call.blocks:
        block = call.block(c0, c1)
        sums = call.sums(block)
        L_start, R_start, carry = call.scan(c0, c1, sums, carry)
        running = call.running(block, sums.top, L_start, R_start)
        queries, held = call.rows_of(call.query, c0, c1), running_mass(call, running)
        W = read_landmarks(call, queries, call.group * call.chunk, held).W
        rows = block_output(call, running, W, R_start.flatten(0, 2), block.value)
        call.put_rows(out, rows, c0, c1)
    L_end, R_end = (call.L0.clone(), call.R0.clone()) if carry is None else carry[2:]
    return Saved(call.gather(out).contiguous(), L_end, R_end)


def read_landmarks(call: Setup, query: Tensor, rows: int, held: Tensor | None) -> Reading:
    """Features and weights of queries (B, H, n * rows, D) on the landmarks.

    `held`: for "mass", exp(L - half) up to a factor of the row, broadcastable to
    (Z, group, rows / group, M).
    """
    scores = query @ call.lk.mT
    if held is None:
        F = torch.softmax(scores, -1)
        return Reading(call.mats(F, rows), call.mats(F @ call.core, rows), None)
    F = kernel_features(call.half, scores)
    G = call.mats(F @ call.core, rows)
    mass = (G.unflatten(1, (call.group, -1)) * held).sum(-1, keepdim=True)
    unseen = (held == 0).all(-1, keepdim=True)
    factor = (held / mass.masked_fill(unseen, 1.0)).flatten(1, 2)
    return Reading(call.mats(F, rows), G * factor, factor)


def running_mass(call: Chunks, running: Running) -> Tensor | None:
    """`held` of a causal call: (Z, 1, C, M), None where rows are not normalised by mass."""
    if not call.mass:
        return None
    L = call.true_L(running).view(call.batch, call.heads, -1, call.marks)
    return held_mass(L - call.half.unsqueeze(-2)).view(-1, 1, call.chunk, call.marks)


def kernel_features(half: Tensor, scores: Tensor) -> Tensor:
    """exp(q . k_l - s_ll / 2), scaled to a row maximum of 1."""
    scores = scores - half.unsqueeze(-2)
    return torch.exp(scores - scores.amax(-1, keepdim=True))


def held_mass(L: Tensor) -> Tensor:
    """exp(L), scaled to a row maximum of 1; zero where nothing is held."""
    top = L.amax(-1, keepdim=True)
    return torch.exp(L - top.masked_fill(top == NEG_INF, 0.0))


def block_output(call: Chunks, running: Running, W: Tensor, R0: Tensor, value: Tensor) -> Tensor:
    """out = (W e^{L0-L}) R0 + [(W e^{ref-L}) (e^{u-ref})^T where j <= i] V: (Z, group * C, Dv)"""
    steep = running.steep
    kept = None if steep is None else W[steep.index]
    weights = over_rows(call, W, running.cum)
    between = lower(call, torch.bmm(weights, running.P.mT))
    out = torch.baddbmm(torch.bmm(weights, R0), between, value)
    if steep is not None:
        exact = steep_output(call, steep, kept)
        slow = steep.slow.repeat(1, call.group).unsqueeze(-1)
        out[steep.index] = torch.where(slow, exact, out[steep.index])
    return out


def over_rows(call: Chunks, x: Tensor, cum: Tensor) -> Tensor:
    """x / cum, for x with a row per head of the group."""
    if call.group == 1:
        return x / cum
    return (x.unflatten(1, (call.group, -1)) / cum.unsqueeze(1)).flatten(1, 2)


def lower(call: Chunks, x: Tensor) -> Tensor:
    """Select j <= i, in place: entries above the diagonal become 0 whatever they were."""
    x.view(-1, call.group, call.chunk, call.chunk).tril_()
    return x


def steep_output(call: Chunks, steep: Steep, W: Tensor) -> Tensor:
    """The rows of steep chunks, one token after another: no exponent is ever positive."""
    W = W.unflatten(1, (call.group, -1))
    out = W.new_empty(*W.shape[:3], call.dim_v)
    for i, (_, R) in enumerate(steep_states(steep)):
        out[:, :, i] = torch.bmm(W[:, :, i], R)
    return out.flatten(1, 2)


def steep_states(steep: Steep):
    """Yield (e^{u_i - L(i)}, R(i)) for every token i of the steep chunks: (n, M) and (n, M, Dv)."""
    L, R = steep.L0, steep.R0
    for i in range(steep.L.shape[1]):
        later = steep.L[:, i]
        own = exp_difference(steep.scores[:, i], later)
        R = exp_difference(L, later).unsqueeze(-1) * R
        R = R + own.unsqueeze(-1) * steep.value[:, i].unsqueeze(1)
        L = later
        yield own, R


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b), 0 where a = -inf, b = -inf included."""
    return torch.exp(a - b.masked_fill(b == NEG_INF, 0.0))


def one_token(call: Setup) -> Saved:
    """Decoding: the recurrence itself."""
    given = call.call
    L0, R0 = call.incoming()
    query, key, value = (x.to(call.dtype) for x in (given.query, given.key, given.value))
    decay, key_mask = given.decay, given.key_mask
    scores = (key @ call.lq.mT).squeeze(2)  # (B, H, M)
    if key_mask is not None:
        hidden = ~key_mask[:, :, None]
        scores = scores.masked_fill(hidden, NEG_INF)
        value = value.masked_fill(hidden.unsqueeze(-1), 0.0)
    before = L0 if decay is None else L0 - decay.to(call.dtype)
    L = torch.logaddexp(before, scores)
    R = torch.lerp(R0, value, exp_difference(scores, L).unsqueeze(-1))
    scores = query.unflatten(1, (call.heads, call.group)).squeeze(3) @ call.lk.mT
    if call.mass:
        F = kernel_features(call.half, scores)
        held = held_mass(L - call.half).unsqueeze(2)
        G = F @ call.core * held
        mass = G.sum(-1, keepdim=True)
        W = G / mass.masked_fill((held == 0).all(-1, keepdim=True), 1.0)
    else:
        W = torch.softmax(scores, -1) @ call.core
    return Saved((W @ R).flatten(1, 2).unsqueeze(2).to(given.query.dtype), L, R)
