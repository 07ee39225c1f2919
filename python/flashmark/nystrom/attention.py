"""Nyström attention: the public function and what it checks."""

from __future__ import annotations

import math
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from flashmark import reference
from flashmark.arguments import (
    Landmarks,
    check_key_mask,
    check_qkv,
    check_same,
    check_tensor,
    finite,
    flag,
)
from flashmark.autograd import (
    check_no_derivative,
    needs_gradient,
    refuse_tracing,
    under_autocast,
    unit_stride,
)
from flashmark.dispatch import choose_backend
from flashmark.nystrom.call import Call, Options
from flashmark.nystrom.checks import (
    check_core,
    check_landmarks,
    check_lengths,
    default_core,
    readable,
    wide_landmarks,
)
from flashmark.nystrom.operator import run
from flashmark.nystrom.state import NystromState
from flashmark.sharded import call_on_shards, is_sharded

NORMALIZATIONS = ("landmark", "mass")


@overload
def nystrom_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *,
    return_state: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def nystrom_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *, return_state: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, NystromState]: ...  # fmt: skip
@overload
def nystrom_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *, return_state: bool,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, NystromState]: ...  # fmt: skip
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
    state: NystromState | None = None,
    return_state: bool = False,
    state_out: NystromState | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, NystromState]:
    """Attention through landmarks in linear time, strictly causal, with a state of constant size.

    Landmark l summarises the visible past as a softmax-weighted mean of the values,
    R_l(i) = sum_j softmax_j(scale k_j . x_l - decay_l (i - j)) v_j, and query i reads the
    summaries: out_i = sum_l W_il R_l(i), W_i = softmax_l(scale q_i . x_l) core. Landmarks are
    parameters, so nothing of the future reaches an output.

    Args:
        query: (B, Hq, Nq, D), float16, bfloat16, float32 or float64; D from 1 to 256.
        key: (B, Hkv, Nk, D), same dtype; Hq a multiple of Hkv. Nk == Nq when causal or packed.
        value: (B, Hkv, Nk, Dv), same dtype; Dv from 1 to 256.
        landmarks: (Hkv, M, D), M from 1 to 256, tied: queries and keys of the landmarks are one
            tensor, which we advise. Or a pair (landmark queries, landmark keys) of that shape. A
            leading batch dimension makes them data-dependent. Any floating-point dtype.
        core: (Hkv, M, M) or (B, Hkv, M, M); `landmark_core` of the landmarks when None, with
            kind="kernel" for normalize="mass" (a given core has to be of that kind then).
        is_causal: query i sees keys up to i; False: all of them, and Nq may differ from Nk.
        scale: factor of every score; 1 / sqrt(D) when None.
        normalize: "landmark": as above. "mass": the kernel form, W_il proportional to
            G_il exp(L_l(i)) with G = exp(scale q X^T) S^+, S = exp(scale X X^T), divided by its sum
            over l. That sum is positive where the approximated kernel is; it is not clamped.
        decay: (Hkv, M), >= 0, per token: landmarks forget. Causal only.
        key_mask: bool (B, Nk), True where the key takes part. Masked tokens still advance time;
            what their memory holds, NaN included, reaches no result.
        cu_seqlens: int32 or int64 (S + 1,), B = 1: S sequences packed along N, from cu_seqlens[s]
            to cu_seqlens[s + 1]. States then lead with S.
        state: what the tokens before left, from `return_state`; differentiable.
        return_state: also return the state after the last token; differentiable.
        state_out: a state to overwrite with it, for decoding (it may be `state`). No gradient.
        backend: "auto", "triton", "cpu", "eager" or "reference". A named backend runs or raises.
            Without causality the work is dense products, which "cpu" leaves to PyTorch.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of `query`; with `return_state` also a NystromState. Rows
        that see no key are 0. Where rows of `core` sum to 1, a constant value comes back.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from flashmark import init_landmarks, nystrom_attention
        >>> query, key, value = (torch.randn(1, 2, 50, 16) for _ in range(3))
        >>> out, state = nystrom_attention(
        ...     query, key, value, init_landmarks(2, 8, 16), return_state=True
        ... )
        >>> out.shape, state.L.shape, state.R.shape
        (torch.Size([1, 2, 50, 16]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8, 16]))

    Forward mode and derivatives of gradients keep 16 M numbers for each token and key head.

    The values of `decay` and `cu_seqlens` are checked on CPU tensors only. The approximation is
    that of Xiong et al., "Nyströmformer" (2021), with learned landmarks and a causal normaliser.
    """
    if is_sharded(query, key, value, landmarks, core, decay, key_mask, cu_seqlens):
        return call_on_shards(nystrom_attention, **locals())
    refuse_tracing("nystrom_attention")
    query, key, value = under_autocast(query, key, value)
    check_qkv(query, key, value)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected 'landmark' or 'mass', got {normalize!r}")
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    is_causal = flag("is_causal", is_causal)
    cu_seqlens = check_lengths(query, key, is_causal, cu_seqlens)
    tied = isinstance(landmarks, Tensor)
    lq, lk = check_landmarks(landmarks, query, key)
    marks = lq.shape[-2]
    backend = choose_backend(
        "nystrom", backend, query, landmarks=marks, gradients=torch.is_grad_enabled()
    )
    check_core(core, query.shape[0], key.shape[1], marks, query.device)
    _check_decay(decay, is_causal, (key.shape[1], marks), query.device)
    check_key_mask(key_mask, (key.shape[0], key.shape[2]), query.device)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    held = rows, key.shape[1], marks, value.shape[3]
    L0, R0 = _check_state("state", state, held, query.device)
    if state_out is not None:
        _check_state_out(state_out, held, query, (key, value, lq, lk, core, decay, L0, R0))

    if core is None or needs_gradient((lq, lk), (0, 1)):
        lq, lk = wide_landmarks(lq, lk, query.dtype)
    if core is None:
        kind = "softmax" if normalize == "landmark" else "kernel"
        core = default_core(lq, None if tied else lk, scale, kind)
    if backend == "reference":
        out, ends = reference.nystrom_attention(
            query, key, value, (lq, lk), core=core, is_causal=is_causal, scale=scale,
            normalize=normalize, decay=decay, key_mask=key_mask, cu_seqlens=cu_seqlens,
            state=state, return_state=True,
        )  # fmt: skip
        dtype = torch.promote_types(query.dtype, torch.float32)
        L, R = (x.to(dtype) for x in ends)
    else:
        lq, lk = unit_stride(lq), unit_stride(lk)
        call = Call(
            unit_stride(query), unit_stride(key), unit_stride(value), lq, lk, unit_stride(core),
            scale, decay, key_mask, cu_seqlens, L0, R0, normalize == "mass", is_causal,
        )  # fmt: skip
        out, L, R = run(call, backend, state_out)
    if state_out is not None:
        if L is not state_out[0]:
            state_out[0].copy_(L)
            state_out[1].copy_(R)
        return (out, state_out) if return_state else out
    return (out, NystromState(L, R)) if return_state else out


def _check_decay(decay, is_causal: bool, shape: tuple[int, int], device) -> None:
    if decay is None:
        return
    if not is_causal:
        raise ValueError("decay: expected None with is_causal=False, got a tensor")
    check_tensor("decay", decay, 2)
    check_same("decay", decay, dtype=None, device=device)
    if tuple(decay.shape) != shape:
        raise ValueError(f"decay: expected shape {shape}, got {tuple(decay.shape)}")
    if readable(decay) and not bool((decay >= 0).all()):
        raise ValueError(f"decay: expected values >= 0, got {float(decay.detach().amin())}")


def _check_state(name: str, state, held, device) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"{name}: expected a NystromState, got {type(state).__name__}")
    for part, x, shape in (("L", state[0], held[:3]), ("R", state[1], held)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}.{part}: expected a tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{name}.{part}: expected shape {shape}, got {tuple(x.shape)}")
        check_same(f"{name}.{part}", x, dtype=None, device=device)
    return state[0], state[1]


def _check_state_out(state_out, held, query, others) -> None:
    _check_state("state_out", state_out, held, query.device)
    check_no_derivative("state_out", query, *others, *state_out)
