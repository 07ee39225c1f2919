"""Hybrid attention: exact nearby, landmarks beyond. The public functions."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from flashmark import reference
from flashmark.arguments import check_key_mask, check_qkv, finite
from flashmark.autograd import distinct, refuse_transforms, under_autocast, unit_stride
from flashmark.hybrid import far_field
from flashmark.hybrid import operator as _operators  # noqa: F401, registers torch.ops.flashmark.hybrid_*
from flashmark.hybrid.checks import MERGES, backends_of, check_merge, check_window
from flashmark.hybrid.far_field import Far
from flashmark.hybrid.layout import FromStart, Packing, Resumed, taken
from flashmark.hybrid.merge import attend
from flashmark.hybrid.state import HybridState, check_state
from flashmark.nystrom.checks import check_core, check_landmarks, check_lengths, default_core
from flashmark.options import HybridOptions, Landmarks
from flashmark.sharded import over_shards


@overload
def hybrid_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *, window: int,
    return_state: Literal[False] = False, **options: Unpack[HybridOptions],
) -> Tensor: ...  # fmt: skip
@overload
def hybrid_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Landmarks, *, window: int,
    return_state: Literal[True], **options: Unpack[HybridOptions],
) -> tuple[Tensor, HybridState]: ...  # fmt: skip
@over_shards
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
        cu_seqlens: int32 (S + 1,), B = 1: S sequences packed along N; states then lead with S. They
            are spread over S rows of the longest length, which waits for a GPU.
        state: what the tokens before left, from `return_state`; differentiable.
        return_state: also return the state after the last token; differentiable.
        backend: "auto", "triton", "cpu", "eager" or "reference". A named backend runs or raises.

    Returns:
        out (B, Hq, N, Dv) in the dtype of `query`; with `return_state` also a HybridState. A row
        that sees no key is 0. Any split of a stream into calls gives the same outputs.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    refuse_transforms("hybrid_attention")
    query, key, value = under_autocast(query, key, value)
    check_qkv(query, key, value)
    cu_seqlens = check_lengths(query, key, True, cu_seqlens)
    check_merge(merge, gate, core, landmarks, query)
    window = check_window(window)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    tied = isinstance(landmarks, Tensor)
    lq, lk = check_landmarks(landmarks, query, key)
    marks = lq.shape[-2]
    near, far = backends_of(backend, merge, query, marks)
    check_core(core, query.shape[0], key.shape[1], marks, query.device)
    check_key_mask(key_mask, (key.shape[0], key.shape[2]), query.device)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if near == "reference":
        return reference.hybrid_attention(  # type: ignore[return-value]
            query, key, value, landmarks, window=window, merge=merge, gate=gate, core=core,
            scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state,  # type: ignore[arg-type]
            return_state=return_state,
        )  # fmt: skip
    check_state(state, rows, window, merge, marks, key, value)
    if core is None and merge != "slots":
        kind = "softmax" if merge == "gate" else "kernel"
        core = default_core(lq, None if tied else lk, scale, kind, query.dtype)
    lq, lk, core = _unit_strides(lq, lk, core)
    far = Far(merge, lq, lk, core, scale, far)

    lengths, packing = query.shape[2], None
    if cu_seqlens is not None:
        packing = Packing(cu_seqlens, query.shape[2])
        if gate is not None:
            gate = packing.rows_of(gate.expand(*query.shape[:3], 1))
        query, key, value = (packing.rows_of(x) for x in (query, key, value))
        key_mask = packing.mask_of(key_mask)
        lengths = packing.lengths
    query, key, value = distinct(*(unit_stride(x) for x in (query, key, value)))
    if state is None and not return_state:
        out = _from_start(far, near, window, query, key, value, gate, key_mask)
    else:
        if state is None:
            state = HybridState.empty(
                rows, key.shape[1], marks, key.shape[3], value.shape[3], window=window,
                merge=merge, dtype=key.dtype, device=key.device,
            )  # fmt: skip
        out, state = _resumed(
            far, near, window, query, key, value, gate, key_mask, state, lengths, return_state
        )
    if packing is not None:
        out = packing.packed(out)
    return (out, state) if return_state and state is not None else out


class HybridStatistics(NamedTuple):
    """How the far field of hybrid attention is used."""

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
        (an occupancy near 1), or slots that stay empty, are landmarks that do no work.

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
            core = default_core(lq, None, scale, "kernel", query.dtype)
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


def _from_start(far, backend, window, query, key, value, gate, key_mask) -> Tensor:
    layout = FromStart(window, query.shape[2])
    keep = key_mask
    if keep is not None:
        hidden = ~keep[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    totals = None
    if layout.chunks:
        if keep is not None:
            keep = layout.keys(keep[:, None, :, None])[:, 0, :, :, 0]
        totals = far_field.of_chunks(far, layout.keys(key), layout.keys(value), keep)
        totals = far_field.running(far, totals)
    return attend(far, backend, layout, query, key, value, gate, key_mask, totals)


def _resumed(
    far, backend, window, query, key, value, gate, key_mask, state, lengths, return_state
) -> tuple[Tensor, HybridState | None]:
    layout = Resumed(window, query.shape[2], state.position)
    own = layout.own
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        own = own & layout.keys(key_mask[:, None, :, None])[:, 0, :, :, 0]
    # all before the two chunks at hand, the one before, the current one so far, those that follow
    chunks = tuple(state.far)
    if layout.chunks:
        new = far_field.of_chunks(far, layout.keys(key), layout.keys(value), own)
        current = far_field.added(
            far, tuple(x[:, :, 2:] for x in chunks), tuple(x[:, :, :1] for x in new)
        )
        chunks = tuple(
            torch.cat([x[:, :, :2], c, n[:, :, 1:]], 2)
            for x, c, n in zip(chunks, current, new, strict=True)
        )
    totals = far_field.running(far, chunks)
    near_key, near_value = layout.near(state.key, key), layout.near(state.value, value)
    near_keep = layout.near_mask(state.keep, key_mask)
    read = tuple(x[:, :, : layout.chunks] for x in totals)
    out = attend(far, backend, layout, query, near_key, near_value, gate, near_keep, read)
    if not return_state:
        return out, None
    entered = layout.entered(lengths)
    nothing = far_field.empty(
        far.merge, (*chunks[0].shape[:2], 1, chunks[0].shape[3]), key.shape[3], value.shape[3],
        chunks[0].dtype, key.device,
    )  # fmt: skip
    held = []
    for total, chunk, none in zip(totals, chunks, nothing, strict=True):
        chunk = torch.cat([chunk, none], 2)
        parts = [_at(total, entered), _at(chunk, entered + 1), _at(chunk, entered + 2)]
        held.append(torch.cat(parts, 2))
    keep = layout.last(near_keep[:, None, :, None], entered)[:, 0, :, 0]
    return out, HybridState(
        state.position + lengths,
        keep,
        layout.last(near_key, entered),
        layout.last(near_value, entered),
        tuple(held),
    )


def _at(x: Tensor, chunk: Tensor) -> Tensor:
    """(B, H, 1, ...): one chunk of each row."""
    return taken(x.flatten(3), chunk.unsqueeze(1)).view(*x.shape[:2], 1, *x.shape[3:])


def _unit_strides(lq: Tensor, lk: Tensor, core: Tensor | None):
    """Landmarks that were one tensor stay so."""
    keys = unit_stride(lk)
    return keys if lq is lk else unit_stride(lq), keys, None if core is None else unit_stride(core)
