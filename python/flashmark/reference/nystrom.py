"""The definition of Nyström attention and of its core, densely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    core: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    normalize: str = "landmark",
    decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    state_out: tuple[Tensor, Tensor] | None = None,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Nyström attention through landmarks, as `flashmark.nystrom_attention`, computed densely.

    All computation is in the dtype of `query`. The state is a plain pair (L, R).
    """
    if cu_seqlens is not None:  # each sequence on its own
        bounds = cu_seqlens.tolist()
        parts = []
        for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            own = None if state is None else tuple(x[s : s + 1] for x in state)
            mask = None if key_mask is None else key_mask[:, start:stop]
            query_s, key_s, value_s = (x[:, :, start:stop] for x in (query, key, value))
            parts.append(
                nystrom_attention(
                    query_s, key_s, value_s, landmarks, core=core, is_causal=is_causal, scale=scale,
                    normalize=normalize, decay=decay, key_mask=mask, state=own, return_state=True,
                )
            )  # fmt: skip
        out = torch.cat([out for out, _ in parts], dim=2)
        state = tuple(torch.cat([end[n] for _, end in parts]) for n in (0, 1))
    else:
        out, state = _nystrom_one_sequence(
            query, key, value, landmarks, core, is_causal, scale, normalize, decay, key_mask, state
        )
    if state_out is not None:
        for old, new in zip(state_out, state, strict=True):
            old.copy_(new)
    return (out, state) if return_state else out


def _nystrom_one_sequence(
    query, key, value, landmarks, core, is_causal, scale, normalize, decay, key_mask, state
):
    dtype, (batch, heads, q_len, dim), (kv_heads, kv_len) = query.dtype, query.shape, key.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    pair = (landmarks, landmarks) if isinstance(landmarks, Tensor) else landmarks
    lq, lk = (x.to(dtype) for x in pair)  # ([B,] Hkv, M, D)
    if core is None:
        wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in pair]  # it is solved for
        core = landmark_core(wide[0], None if pair[0] is pair[1] else wide[1], scale, normalize)
    query = query.unflatten(1, (kv_heads, heads // kv_heads))  # (B, Hkv, group, Nq, D)
    if key_mask is not None:  # what is masked never enters a product
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)

    # [b, h, i, l, j]: how landmark l reads key j at the time of query i
    scores = (scale * lq @ key.transpose(-1, -2)).unsqueeze(2).expand(-1, -1, q_len, -1, -1)
    visible = torch.ones(batch, 1, q_len, 1, kv_len, dtype=torch.bool, device=key.device)
    if is_causal:
        time = torch.arange(q_len, device=key.device)
        age = time[:, None] - time
        visible = visible & (age >= 0)[:, None]
        if decay is not None:
            scores = scores - decay.to(dtype)[:, None, :, None] * age[:, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, None]
    scores = scores.masked_fill(~visible, NEG_INF)
    if state is None:
        shape = (batch, kv_heads, lq.shape[-2])
        state = query.new_full(shape, NEG_INF), query.new_zeros(*shape, value.shape[-1])
    L0, R0 = (x.to(dtype) for x in state)
    L0 = L0.unsqueeze(2).expand(-1, -1, q_len, -1)
    if decay is not None:
        L0 = L0 - decay.to(dtype)[:, None] * (time + 1)[:, None]
    scores = torch.cat([scores, L0.unsqueeze(-1)], dim=-1)  # the state is one more key

    empty = (scores == NEG_INF).all(-1)  # no key so far: L is -inf and R is 0
    L = torch.logsumexp(scores.masked_fill(empty.unsqueeze(-1), 0.0), -1)
    weights = torch.exp(scores - L.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)
    R = weights[..., :-1] @ value.unsqueeze(2)  # (B, Hkv, Nq, M, Dv)
    R = R + weights[..., -1:] * R0.unsqueeze(2)

    reading = query @ (scale * lk).transpose(-1, -2).unsqueeze(-3)  # (B, Hkv, group, Nq, M)
    if normalize == "landmark":
        W = torch.softmax(reading, -1) @ core.to(dtype).unsqueeze(-3)
    else:  # "mass": the kernel exp(q . k), scaled by exp(-s_ll / 2) so that S has a unit diagonal
        half = 0.5 * scale * (lq * lk).sum(-1)  # ([B,] Hkv, M)
        reading = reading - half[..., None, None, :]
        held = (L - half.unsqueeze(-2)).masked_fill(empty, NEG_INF)
        top = held.amax(-1, keepdim=True)
        held = torch.exp(held - top.masked_fill(top == NEG_INF, 0.0)).unsqueeze(2)
        G = torch.exp(reading - reading.amax(-1, keepdim=True)) @ core.to(dtype).unsqueeze(-3)
        mass = (G * held).sum(-1, keepdim=True)
        unseen = empty.all(-1)[:, :, None, :, None]
        W = (G * held / mass.masked_fill(unseen, 1.0)).masked_fill(unseen, 0.0)
    out = torch.einsum("bhgil,bhild->bhgid", W, R).flatten(1, 2)
    if q_len == 0:
        return out, state
    return out, (L.masked_fill(empty, NEG_INF)[:, :, -1], R[:, :, -1])


def landmark_core(
    landmark_queries: Tensor,
    landmark_keys: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "landmark",
    jitter: float = 1e-4,
) -> Tensor:
    """The default of `flashmark.landmark_core`, with plain inverses; kind "kernel" for "mass"."""
    scale = 1 / math.sqrt(landmark_queries.shape[-1]) if scale is None else scale
    tied = landmark_keys is None
    landmark_keys = landmark_queries if tied else landmark_keys
    scores = scale * landmark_queries @ landmark_keys.transpose(-1, -2)
    half = 0.5 * scores.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    S = torch.exp(scores - half.unsqueeze(-1) - half.unsqueeze(-2))  # unit diagonal
    if tied:
        inverse = torch.linalg.inv(S + jitter * eye)
        if normalize == "mass":
            return inverse
        root = torch.exp(half - half.amax(-1, keepdim=True))  # the diagonal taken out, rescaled
        row_sums = ((S + jitter * eye) * root.unsqueeze(-2)).sum(-1)
        return inverse * row_sums.unsqueeze(-2) / root.unsqueeze(-1)
    if normalize == "mass":
        return torch.linalg.inv(S.transpose(-1, -2) @ S + jitter * eye) @ S.transpose(-1, -2)
    A = torch.softmax(scores, -1)
    pull = jitter / scores.shape[-1]  # towards the plain mean, so that rows still sum to 1
    return torch.linalg.inv(A.transpose(-1, -2) @ A + jitter * eye) @ (A.transpose(-1, -2) + pull)
