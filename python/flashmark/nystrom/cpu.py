"""Causal Nyström attention by the C++ kernels: the interface of `nystrom.eager.interface`.

With is_causal=False nothing runs along time: the work is three dense products, which PyTorch
already does as fast as the machine can, so those calls are plain PyTorch here too.
"""

from __future__ import annotations

from torch import Tensor

from flashmark.cpu import operators


def forward(
    query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
    L0, R0, scale, normalize, is_causal,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, L_end, R_end); states are float32."""
    if not is_causal:
        from flashmark.nystrom.eager import interface as eager

        return eager.forward(
            query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
            L0, R0, scale, normalize, is_causal,
        )  # fmt: skip
    lq, lk, half = _landmarks(landmark_queries, landmark_keys, scale, normalize)
    rest = decay, key_mask, cu_seqlens, L0, R0
    return operators().nystrom_forward(query, key, value, lq, lk, _batched(core), half, *rest)


def backward(
    dout, dL_end, dR_end, query, key, value, landmark_queries, landmark_keys, core, decay, key_mask,
    cu_seqlens, L0, R0, scale, normalize, is_causal,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `forward`: the same bits for any number of threads."""
    if not is_causal:
        from flashmark.nystrom.eager import interface as eager

        return eager.backward(
            dout, dL_end, dR_end, query, key, value, landmark_queries, landmark_keys, core, decay,
            key_mask, cu_seqlens, L0, R0, scale, normalize, is_causal,
        )  # fmt: skip
    lq, lk, half = _landmarks(landmark_queries, landmark_keys, scale, normalize)
    dquery, dkey, dvalue, dlq, dlk, dcore, dhalf, ddecay, dL0, dR0 = operators().nystrom_backward(
        dout, dL_end, dR_end, query, key, value, lq, lk, _batched(core), half,
        decay, key_mask, cu_seqlens, L0, R0,
    )  # fmt: skip
    dlq, dlk = dlq * scale, dlk * scale
    if half is not None:  # half = 0.5 scale q~ . k~
        pull = 0.5 * dhalf.unsqueeze(-1)
        dlq, dlk = dlq + pull * lk, dlk + pull * lq
    dlq, dlk = _like(dlq, landmark_queries), _like(dlk, landmark_keys)
    ddecay = None if decay is None else _sum(ddecay).to(decay.dtype)
    states = (None, None) if L0 is None else (dL0.to(L0.dtype), dR0.to(R0.dtype))
    return dquery, dkey, dvalue, dlq, dlk, _like(dcore, core), ddecay, *states


def _landmarks(landmark_queries: Tensor, landmark_keys: Tensor, scale: float, normalize: str):
    """Scaled landmarks (B | 1, Hkv, M, D), and s_ll / 2 for "mass"."""
    queries, keys = (_batched(x).float() for x in (landmark_queries, landmark_keys))
    half = 0.5 * scale * (queries * keys).sum(-1) if normalize == "mass" else None
    return queries * scale, keys * scale, half


def _batched(x: Tensor) -> Tensor:
    """(H, ., .) or (B, H, ., .) -> (B | 1, H, ., .)"""
    return x if x.dim() == 4 else x.unsqueeze(0)


def _sum(x: Tensor) -> Tensor:
    """Over the leading dimension, in order."""
    total = x[0].clone() if x.shape[0] else x.new_zeros(x.shape[1:])
    for part in x[1:]:
        total += part
    return total


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """From one sum a sample to the shape and dtype of `x`."""
    if x.dim() == 3 or x.shape[0] != grad.shape[0]:
        grad = _sum(grad)
    return grad.reshape(x.shape).to(x.dtype).contiguous()
