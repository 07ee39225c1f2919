"""Hybrid attention: exact nearby, landmarks beyond. The public functions."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from flashmark import reference
from flashmark.arguments import Landmarks, check_key_mask, check_qkv, finite
from flashmark.autograd import (
    check_no_derivative,
    needs_gradient,
    refuse_tracing,
    under_autocast,
    unit_stride,
)
from flashmark.hybrid import far_field
from flashmark.hybrid.call import MERGES, Call, Options, check_merge, check_window, parts_of
from flashmark.hybrid.far_field import Far
from flashmark.hybrid.layout import FromStart
from flashmark.hybrid.operator import run
from flashmark.hybrid.state import HybridState, check_state, tensors_of
from flashmark.nystrom.checks import (
    check_core,
    check_landmarks,
    check_lengths,
    default_core,
    wide_landmarks,
)
from flashmark.sharded import call_on_shards, is_sharded


@overload
def hybrid_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *, window: int,
    return_state: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def hybrid_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *, window: int,
    return_state: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, HybridState]: ...  # fmt: skip
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
    state: HybridState | None = None,
    return_state: bool = False,
    state_out: HybridState | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, HybridState]:
    """Causal attention that is exact nearby and goes through landmarks beyond, in linear time.

    Chunks of `window` tokens are counted from the start of the stream. Query i sees exactly the
    keys j <= i with i // window - j // window <= 1; all chunks before these it sees through what
    landmarks keep of them. No key counts twice, and nothing of the future reaches an output.

    - merge="slots": landmarks route keys, a_jl = softmax_l(scale k_j . x_l), and slot l holds
      n_l = sum_j a_jl keys, their mean key and their mean value. A row is one softmax over near
      keys and the slots, whose logits are scale q . mean key + log n_l.
    - merge="mass": the kernel form of Nyström attention, exp(scale q X^T) S^-1 exp(scale X k^T),
      S = exp(scale X X^T), in one denominator with the near keys. Where the approximated mass of a
      row is not positive, its far field is dropped.
    - merge="gate": gate * near + (1 - gate) * far, with the far field of `nystrom_attention`.

    Args:
        query: (B, Hq, N, D), float16, bfloat16, float32 or float64; D from 1 to 256.
        key: (B, Hkv, N, D), same dtype; Hq a multiple of Hkv.
        value: (B, Hkv, N, Dv), same dtype; Dv from 1 to 256.
        landmarks: (Hkv, M, D), M from 1 to 256, or a pair (landmark queries, landmark keys); a
            leading batch dimension makes them data-dependent. "slots" uses the landmark queries
            alone; "mass" takes one tensor.
        window: tokens of a chunk, >= 1.
        merge: "slots", "mass" or "gate".
        gate: broadcastable to (B, Hq, N, 1), for merge="gate" only. Rows without a far field take
            the near one whole.
        core: (Hkv, M, M) or (B, Hkv, M, M), not for "slots"; `landmark_core` of the landmarks when
            None, with kind="kernel" for "mass".
        scale: factor of every score; 1 / sqrt(D) when None.
        key_mask: bool (B, N), True where the key takes part. Masked tokens still advance time.
        cu_seqlens: int32 (S + 1,), B = 1: S sequences packed along N; states then lead with S.
        state: the state after the tokens before, from `return_state`; differentiable.
        return_state: also return the state after the last token; differentiable.
        state_out: a state to write the state after the last token into; it may be `state` itself,
            which then moves on in place, and is what `return_state` returns. Without gradients.
        backend: "auto", "triton", "cpu", "eager" or "reference". A named backend runs or raises.

    Returns:
        out (B, Hq, N, Dv) in the dtype of `query`; with `return_state` also a HybridState. A row
        that sees no key is 0. Any split of a stream into calls gives the same outputs.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Forward mode and derivatives of gradients keep the visible tiles of the near field, and of the
    far field what those of `block_sparse_attention` and `nystrom_attention` keep.
    """
    if is_sharded(query, key, value, landmarks, gate, core):
        return call_on_shards(hybrid_attention, **locals())
    refuse_tracing("hybrid_attention")
    query, key, value = under_autocast(query, key, value)
    check_qkv(query, key, value)
    cu_seqlens = check_lengths(query, key, True, cu_seqlens)
    gate = check_merge(merge, gate, core, landmarks, query)
    window = check_window(window)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    tied = isinstance(landmarks, Tensor)
    lq, lk = check_landmarks(landmarks, query, key)
    marks = lq.shape[-2]
    parts = parts_of(backend, merge, query, marks)
    check_core(core, query.shape[0], key.shape[1], marks, query.device)
    if key_mask is not None:
        check_key_mask(key_mask, (key.shape[0], key.shape[2]), query.device)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if parts[0] == "reference":
        if state_out is not None:
            raise ValueError("state_out: expected None with backend='reference', got a state")
        return reference.hybrid_attention(  # type: ignore[return-value]
            query, key, value, landmarks, window=window, merge=merge, gate=gate, core=core,
            scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state,  # type: ignore[arg-type]
            return_state=return_state,
        )  # fmt: skip
    sizes = rows, window, merge, marks, key, value
    if state is not None:
        check_state("state", state, *sizes)
    if state_out is not None:
        if state_out is not state:
            check_state("state_out", state_out, *sizes)
        held = (*tensors_of(state_out), *(() if state is None else tensors_of(state)))
        check_no_derivative("state_out", query, key, value, lq, lk, core, gate, *held)
    if merge != "slots" and (core is None or needs_gradient((lq, lk), (0, 1))):
        lq, lk = wide_landmarks(lq, lk, query.dtype)
    if core is None and merge != "slots":
        kind = "softmax" if merge == "gate" else "kernel"
        core = default_core(lq, None if tied else lk, scale, kind)
    keys = unit_stride(lk)
    call = Call(
        unit_stride(query), unit_stride(key), unit_stride(value),
        keys if tied else unit_stride(lq), keys, window, merge, scale,
        None if core is None else unit_stride(core), gate, key_mask, cu_seqlens,
        *_fields_of(state), bool(return_state) or state_out is not None,
    )  # fmt: skip
    out, state = run(call, parts, state_out)
    return (out, state) if return_state and state is not None else out


def _fields_of(state: HybridState | None) -> tuple[Tensor | None, ...]:
    """The tensors of a state as a call has them."""
    if state is None:
        return (None,) * 7
    *held, first, last = (x.contiguous() for x in tensors_of(state))
    return (*held, first, None, last) if len(held) == 4 else (*held, first, last)


class HybridStatistics(NamedTuple):
    """Statistics of how hybrid attention uses its far field."""

    occupancy: Tensor  # (B, Hkv, M): the share of all far keys that each slot holds; sums to 1
    clamped: Tensor  # (B, Hq): of the rows with a far field, the part whose mass was not positive


@torch.no_grad()
def hybrid_statistics(
    query: Tensor,
    key: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    window: int,
    merge: str = "slots",
    core: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> HybridStatistics:
    """Diagnostics of `hybrid_attention` on the same inputs: do keys spread over the slots, and how
    often does merge="mass" have to drop the far field?

    Args:
        query, key, landmarks, window, core, scale, key_mask: as for the attention.
        merge: "mass" for `clamped`, which is 0 with the others.

    Returns:
        HybridStatistics, float32 (float64 for float64 inputs), without gradients. The far keys are
        those of the last row; where there are none, both are 0. Keys of a sample all in one slot
        (an occupancy near 1), or slots that stay empty, are landmarks that contribute nothing.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
    """
    value = key[..., :1] if isinstance(key, Tensor) and key.dim() == 4 else key
    check_qkv(query, key, value)
    check_lengths(query, key, True, None)
    if merge not in MERGES:
        raise ValueError(f"merge: expected 'slots', 'mass' or 'gate', got {merge!r}")
    window = check_window(window)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    lq, lk = check_landmarks(landmarks, query, key)
    check_core(core, query.shape[0], key.shape[1], lq.shape[-2], query.device)
    check_key_mask(key_mask, (key.shape[0], key.shape[2]), query.device)
    layout = FromStart(window, query.shape[2])
    wide = torch.promote_types(query.dtype, torch.float32)
    held = query.new_zeros(*key.shape[:2], lq.shape[-2], dtype=wide)
    clamped = query.new_zeros(query.shape[:2], dtype=wide)
    if not layout.chunks:
        return HybridStatistics(held, clamped)
    keep = None
    if key_mask is not None:
        keep = layout.keys(key_mask[:, None, :, None])[:, 0, :, :, 0]
    keys, values = layout.keys(key), layout.keys(value)
    routed = Far("slots", lq, lk, None, scale, "eager")
    held = far_field.of_chunks(routed, keys, values, keep)[0].sum(2)
    if merge == "mass":
        if core is None:
            core = default_core(wide_landmarks(lq, lq, query.dtype)[0], None, scale, "kernel")
        far = Far(merge, lq, lk, core, scale, "eager")
        totals = far_field.running(far, far_field.of_chunks(far, keys, values, keep))
        _, mass, _ = far_field.mass_read(far, layout.queries(query), totals)
        anything = (
            (totals[0] > -math.inf).any(-1).repeat_interleave(query.shape[1] // key.shape[1], 1)
        )
        reads = layout.joined(anything[..., None, None].expand(*mass.shape, 1).to(wide))
        dropped = layout.joined((mass <= 0).unsqueeze(-1).to(wide)) * reads
        clamped = dropped.sum((2, 3)) / reads.sum((2, 3)).clamp_min(1.0)
    return HybridStatistics(held / held.sum(-1, keepdim=True).clamp_min(1e-30), clamped)
