"""Causal Nyström backward: explicit, by blocks of chunks from the last to the first.

A reverse state (G, g) runs against time, referenced to the chunk's end (rho = L at the end). With
D_lj(i) = e^{s_lj - L_l(i)}, sums over i >= j being those of the chunk:

    G_l = sum_{i later} W_il e^{rho - L_l(i)} dO_i
    g_l = sum_{i later} W_il e^{rho - L_l(i)} dW_il
    dW_il = dO_i . R_l(i)
    ds_lj = e^{s_lj - rho} (G_l . v_j - g_l) + sum_{i >= j} W_il D_lj(i) (dO_i . v_j - dW_il)
    dv_j  = sum_l e^{s_lj - rho} G_l + sum_{i >= j} sum_l W_il D_lj(i) dO_i

With normalize="mass", dW in g and ds is replaced by delta_i = dO_i . out_i. States are recomputed,
one a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.nystrom.call import Call, Grads
from flashmark.nystrom.eager.chunks import NEG_INF, Chunks, Running, Setup, Steep
from flashmark.nystrom.eager.forward import (
    Reading,
    exp_difference,
    lower,
    over_rows,
    read_landmarks,
    running_mass,
    steep_states,
)


class Start(NamedTuple):
    """The states at the start of every chunk, and what finds them again."""

    top: Tensor  # (B, H, chunks, M)
    L: Tensor  # (B, H, chunks, M)
    R: Tensor  # (B, H, chunks, M, Dv)
    L_end: Tensor  # (rows, H, M): final states
    R_end: Tensor


class Local(NamedTuple):
    """Gradients that the rows of each chunk give, before the reverse state is known."""

    dW: Tensor  # (Z, group * C, M)
    centre: Tensor  # like dW, or (Z, group * C, 1): what ds subtracts from dO . v
    weights: Tensor  # (Z, group * C, M): W e^{ref - L}
    pairs: Tensor  # (Z, group * C, C): dO_i . v_j, selected where j <= i
    G: Tensor  # (Z, M, Dv): (W e^{L0 - L})^T dO
    g: Tensor  # (Z, M)
    ratio: Tensor  # (Z, M): e^{L0 - rho}


def causal_backward(given: Call, dout: Tensor, dL_end, dR_end) -> Grads:
    """Gradients of a call with is_causal=True."""
    call, decay = Chunks(given), given.decay
    dout = call.spread(dout)
    start = chunk_starts(call)
    dquery, dkey, dvalue = (call.empty(x) for x in (given.query, given.key, given.value))
    grads = empty_gradients(call)
    grads["decay"] = None if decay is None else torch.zeros_like(call.decay, dtype=call.wide)
    G = torch.zeros_like(start.R_end) if dR_end is None else dR_end.to(call.dtype).clone()
    g = (G * start.R_end).sum(-1)
    if dL_end is not None:
        g -= dL_end.to(call.dtype).masked_fill(start.L_end == NEG_INF, 0.0)
    reverse = G, g  # one row a sequence; becomes the gradient of the incoming states

    for c0, c1 in reversed(call.blocks):
        block = call.block(c0, c1)
        L_start, R_start = start.L[:, :, c0:c1], start.R[:, :, c0:c1]
        running = call.running(block, start.top[:, :, c0:c1], L_start, R_start)
        queries = call.rows_of(call.query, c0, c1)
        rows = call.group * call.chunk
        reading = read_landmarks(call, queries, rows, running_mass(call, running))
        dout_rows = call.mats(call.rows_of(dout, c0, c1), rows)
        local = local_gradients(call, running, reading.W, R_start, block.value, dout_rows)
        G, g = reverse_scan(call, c0, c1, local, reverse)
        ds, dv = key_gradients(call, running, reading.W, local, G, g, block.value, dout_rows)
        by_head = ds.view(call.batch, call.heads, -1, call.marks)
        put_keys(call, dkey, by_head @ call.lq, block.keep, c0, c1)
        put_keys(call, dvalue, dv.view(*by_head.shape[:3], -1), block.keep, c0, c1)
        add_(grads["lq"], by_head.mT @ block.key)
        if decay is not None:
            grads["decay"] += decay_gradient(call, c0, c1, reading.W, local, ds, G, g, R_start)
        dq = query_gradients(call, reading, local.dW, local.centre, queries, grads)
        call.put_rows(dquery, dq, c0, c1)

    dquery, dkey, dvalue = (call.gather(x).contiguous() for x in (dquery, dkey, dvalue))
    landmarks = landmark_gradients(call, grads)
    ddecay = None if decay is None else grads["decay"].to(decay.dtype)
    dL0 = dR0 = None
    if given.L0 is not None and given.R0 is not None:
        dR0, g = reverse
        held = torch.isfinite(call.L0)
        dL0 = ((dR0 * call.R0).sum(-1) - g).masked_fill(~held, 0.0).to(given.L0.dtype)
        dR0 = dR0.masked_fill(~held.unsqueeze(-1), 0.0).to(given.R0.dtype)
    return Grads(dquery, dkey, dvalue, *landmarks, ddecay, dL0, dR0)


def chunk_starts(call: Chunks) -> Start:
    shape = call.batch, call.heads, call.chunks, call.marks
    top, L = (torch.empty(shape, dtype=call.dtype, device=call.device) for _ in range(2))
    R = torch.empty(*shape, call.dim_v, dtype=call.dtype, device=call.device)
    carry = None
    for c0, c1 in call.blocks:
        sums = call.sums(call.block(c0, c1))
        top[:, :, c0:c1] = sums.top
        L[:, :, c0:c1], R[:, :, c0:c1], carry = call.scan(c0, c1, sums, carry)
    return Start(top, L, R, *((call.L0, call.R0) if carry is None else carry[2:]))


def local_gradients(call: Chunks, running: Running, W, R_start, value, dout) -> Local:
    R0 = R_start.flatten(0, 2)
    weights = over_rows(call, W, running.cum)
    pairs = lower(call, torch.bmm(dout, value.mT))
    dW = torch.baddbmm(torch.bmm(dout, R0.mT), pairs, running.P)
    dW = over_rows(call, dW, running.cum)
    ratio = (running.seen / running.cum[:, -1:]).squeeze(1)
    G = torch.bmm(weights.mT, dout) * running.seen.mT
    steep = running.steep
    if steep is not None:
        W_steep, dout_steep = W[steep.index], dout[steep.index]
        dW[steep.index] = steep_weight_gradient(call, steep, dout_steep)
        decayed = exp_difference(steep.L0.unsqueeze(1), steep.L).repeat(1, call.group, 1) * W_steep
        G[steep.index] = torch.bmm(decayed.mT, dout_steep)
        ratio[steep.index] = exp_difference(steep.L0, steep.L[:, -1])
    centre = (W * dW).sum(-1, keepdim=True) if call.mass else dW
    g = (weights * centre).sum(1) * running.seen.squeeze(1)
    if steep is not None:
        g[steep.index] = (decayed * centre[steep.index]).sum(1)
    return Local(dW, centre, weights, pairs, G, g, ratio)


def steep_weight_gradient(call: Chunks, steep: Steep, dout: Tensor) -> Tensor:
    dout = dout.unflatten(1, (call.group, -1))
    dW = dout.new_empty(*dout.shape[:3], call.marks)
    for i, (_, R) in enumerate(steep_states(steep)):
        dW[:, :, i] = torch.bmm(dout[:, :, i], R.mT)
    return dW.flatten(1, 2)


def reverse_scan(call: Chunks, c0: int, c1: int, local: Local, reverse) -> tuple[Tensor, Tensor]:
    """(G, g) at the end of each chunk, (Z, M, Dv) and (Z, M); `reverse` moves on a block."""
    shape = call.batch, call.heads, c1 - c0
    own_G, own_g, ratio = (x.view(*shape, *x.shape[1:]) for x in (local.G, local.g, local.ratio))
    ends_G, ends_g = torch.empty_like(own_G), torch.empty_like(own_g)
    for rows, begin, end in call.sequences:
        p0, p1 = max(begin, c0), min(end, c1)
        if p0 >= p1:
            continue
        G, g = (x[rows] for x in reverse)
        for c in range(p1 - c0 - 1, p0 - c0 - 1, -1):
            ends_G[:, :, c], ends_g[:, :, c] = G, g
            G = torch.addcmul(own_G[:, :, c], ratio[:, :, c].unsqueeze(-1), G)
            g = torch.addcmul(own_g[:, :, c], ratio[:, :, c], g)
        reverse[0][rows], reverse[1][rows] = G, g
    return ends_G.flatten(0, 2), ends_g.flatten(0, 2)


def key_gradients(call: Chunks, running: Running, W, local: Local, G, g, value, dout):
    """ds (Z, C, M) and dv (Z, C, Dv)."""
    P, last = running.P, running.cum[:, -1]
    later_G, later_g = G / last.unsqueeze(-1), g / last  # e^{ref - rho} (G, g)
    inner = torch.bmm(local.pairs.mT, local.weights)
    inner = torch.baddbmm(inner, value, later_G.mT)
    pulls = (local.weights * local.centre).view(-1, call.group, call.chunk, call.marks)
    pulls = pulls.squeeze(1) if call.group == 1 else pulls.sum(1)
    after = pulls.flip(1).cumsum(1).flip(1)  # sum over i >= j
    ds = (inner - after).sub_(later_g.unsqueeze(1)).mul_(P)
    between = lower(call, torch.bmm(local.weights, P.mT))
    dv = torch.baddbmm(torch.bmm(P, later_G), between.mT, dout)
    if running.steep is not None:
        index = running.steep.index
        parts = (x[index] for x in (W, local.centre, G, g, dout))
        ds[index], dv[index] = steep_key_gradients(call, running.steep, *parts)
    return ds, dv


def steep_key_gradients(call: Chunks, steep: Steep, W, centre, G, g, dout):
    """The reverse recurrence, one token after another: (G, g) is referenced to L(i)."""
    W, centre, dout = (x.unflatten(1, (call.group, -1)) for x in (W, centre, dout))
    ds, dv = torch.empty_like(steep.scores), torch.empty_like(steep.value)
    for i in range(steep.L.shape[1] - 1, -1, -1):
        L, value = steep.L[:, i], steep.value[:, i]
        G = torch.baddbmm(G, W[:, :, i].mT, dout[:, :, i])
        g = g + (W[:, :, i] * centre[:, :, i]).sum(1)
        own = exp_difference(steep.scores[:, i], L)
        dv[:, i] = torch.bmm(own.unsqueeze(1), G).squeeze(1)
        ds[:, i] = own * (torch.bmm(G, value.unsqueeze(-1)).squeeze(-1) - g)
        earlier = exp_difference(steep.L[:, i - 1] if i else steep.L0, L)
        G, g = G * earlier.unsqueeze(-1), g * earlier
    return ds, dv


def query_gradients(call: Setup, reading: Reading, dW, centre, queries, grads: dict) -> Tensor:
    """dq, shaped as `queries` (B, H, rows, D); adds to the gradients of lk, core and half."""
    shape = call.batch, call.heads, -1, call.marks
    F = reading.F.view(shape)
    if call.mass:
        dG = (reading.factor * (dW - centre)).view(shape)
        dF = dG @ call.core.mT
        dscores = F * dF
        dlog = (reading.W * (dW - centre)).view(shape)  # of Z_l(i), on top of ds
        add_(grads["half"], -(dlog + dscores).sum(2))
    else:
        dG = dW.view(shape)
        dF = dG @ call.core.mT
        dscores = torch._softmax_backward_data(dF, F, -1, F.dtype)  # F * (dF - rowsum(F * dF))
    add_(grads["core"], F.mT @ dG)
    add_(grads["lk"], dscores.mT @ queries)
    return dscores @ call.lk


def decay_gradient(call: Chunks, c0, c1, W, local: Local, ds, G, g, R_start) -> Tensor:
    """Minus each age at the chunk's end times ds_lj, and its length times the gradient of L0.

    The same as sum_j j ds_lj - length dL_end, since adding a constant to every s_lj and to L0 adds
    it to L_end; but ages are small where gradients are large.
    """
    shape = call.batch, call.heads, c1 - c0, call.marks
    length = call.lengths[c0:c1].to(call.dtype)[:, None]
    age = length.unsqueeze(-1) - call.steps  # (nc, C, 1)
    moved = ds.view(*shape[:3], call.chunk, call.marks)
    if call.mass:
        dlog = (W * (local.dW - local.centre)).view(*shape[:3], call.group, call.chunk, call.marks)
        moved = moved - dlog.sum(3)
    R0 = R_start.flatten(0, 2)
    dL0 = local.ratio * ((G * R0).sum(-1) - g) + (local.G * R0).sum(-1) - local.g
    return -((age * moved).sum(3) + length * dL0.view(shape)).to(call.wide).sum((0, 2))


def put_keys(
    call: Chunks, out: Tensor, rows: Tensor, keep: Tensor | None, c0: int, c1: int
) -> None:
    """A key-side gradient into its place; what a mask hides gets none."""
    if keep is not None:
        rows = rows.masked_fill(~keep.reshape(keep.shape[0], 1, -1, 1), 0.0)
    out[:, :, c0 * call.chunk : c1 * call.chunk] = rows


def empty_gradients(call: Setup) -> dict:
    return {name: torch.zeros_like(getattr(call, name)) for name in ("lq", "lk", "core", "half")}


def add_(total: Tensor, part: Tensor) -> None:
    """total += part, summed over the batch where `total` has none."""
    total += part if total.shape[0] == part.shape[0] else part.sum(0, keepdim=True)


def landmark_gradients(call: Setup, grads: dict) -> tuple[Tensor, ...]:
    """Gradients of landmark queries, keys and core, in their shapes and dtypes."""
    given = call.call
    dlq, dlk = grads["lq"] * given.scale, grads["lk"] * given.scale
    if call.mass:  # half = 0.5 scale q~ . k~
        pull = 0.5 * grads["half"].unsqueeze(-1)
        dlq = dlq + (pull * call.lk).sum_to_size(dlq.shape)
        dlk = dlk + (pull * call.lq).sum_to_size(dlk.shape)
    found = dlq, dlk, grads["core"]
    like = given.landmark_queries, given.landmark_keys, given.core
    return tuple(x.view(y.shape).to(y.dtype) for x, y in zip(found, like, strict=True))
