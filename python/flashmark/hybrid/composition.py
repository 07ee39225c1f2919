"""Hybrid attention composed of block-sparse attention, Nyström attention and the far field: all
calls that C++ does not run whole. Differentiable.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashmark.autograd import distinct, reached, unit_stride
from flashmark.block_sparse.call import Call as BlockSparseCall
from flashmark.block_sparse.operator import OPERATOR as BLOCK_SPARSE
from flashmark.hybrid import far_field
from flashmark.hybrid.call import Call
from flashmark.hybrid.far_field import Far
from flashmark.hybrid.layout import FromStart, PackedRows, Resumed, taken
from flashmark.hybrid.state import HybridState, Totals, empty_totals
from flashmark.masks import BlockMask
from flashmark.masks.block_mask import pack_mask
from flashmark.masks.cache import block_mask_for, compiled
from flashmark.masks.positions import LocalChunks
from flashmark.tracing import constant_when_traced

LEAST_HELD = 1e-30  # a slot that holds less counts as empty
SLOT_ALIGNMENT = 128  # slots end, and tokens begin, where a tile does


def run(call: Call, parts: tuple[str, str]) -> tuple[Tensor, HybridState | None]:
    """The output, and the state where the call asks for it.

    Packed sequences are spread over rows of the longest length, which waits for a GPU.
    """
    near, backend = parts
    far = _far_of(call, backend)
    query, key, value, gate, key_mask = call.query, call.key, call.value, call.gate, call.key_mask
    lengths: int | Tensor = query.shape[2]
    packed = None
    if call.cu_seqlens is not None:
        packed = PackedRows(call.cu_seqlens, query.shape[2])
        if gate is not None:
            gate = packed.rows_of(gate.expand(*query.shape[:3], 1))
        query, key, value = (packed.rows_of(x) for x in (query, key, value))
        key_mask = packed.mask_of(key_mask)
        lengths = packed.lengths
    query, key, value = distinct(query, key, value)
    state = None
    if call.position is None and not call.return_state:
        out = _from_start(far, near, call.window, query, key, value, gate, key_mask)
    else:
        out, state = _resumed(
            far, near, call.window, query, key, value, gate, key_mask, _state_of(call, key, value),
            lengths, call.return_state,
        )  # fmt: skip
    if packed is not None:
        out = packed.packed(out)
    tied = call.landmark_keys is call.landmark_queries
    keys = None if tied else call.landmark_keys
    out = reached(out, call.landmark_queries, keys, call.core, call.gate)
    return out, state


def _far_of(call: Call, backend: str) -> Far:
    """The far field's parameters. Packed sequences, a batch of one, share those of its sample."""
    lq, lk, core = call.landmark_queries, call.landmark_keys, call.core
    tied = lk is lq
    if call.cu_seqlens is not None:
        lq, lk, core = (x[0] if x is not None and x.dim() == 4 else x for x in (lq, lk, core))
    return Far(call.merge, lk if tied else lq, lk, core, call.scale, backend)


def _state_of(call: Call, key: Tensor, value: Tensor) -> HybridState:
    if call.position is None:
        return HybridState.empty(
            key.shape[0], key.shape[1], call.landmark_queries.shape[-2], key.shape[3],
            value.shape[3], window=call.window, merge=call.merge, dtype=key.dtype,
            device=key.device,
        )  # fmt: skip
    far = (call.far_counts, call.far_keys, call.far_values)
    return HybridState(
        call.position, call.keep, call.held_keys, call.held_values,
        tuple(x for x in far if x is not None),
    )  # type: ignore[arg-type]  # fmt: skip


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
    return _attend(far, backend, layout, query, key, value, gate, key_mask, totals)


def _resumed(
    far, backend, window, query, key, value, gate, key_mask, state, lengths, return_state
) -> tuple[Tensor, HybridState | None]:
    layout = Resumed(window, query.shape[2], state.position)
    own = layout.own
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        own = own & layout.keys(key_mask[:, None, :, None])[:, 0, :, :, 0]
    # all chunks before the last two, the last but one, the current one so far, those that follow
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
    out = _attend(far, backend, layout, query, near_key, near_value, gate, near_keep, read)
    if not return_state:
        return out, None
    entered = layout.entered(lengths)
    nothing = empty_totals(
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


def _attend(far, backend, layout, query, key, value, gate, keep, totals) -> Tensor:
    """The near field and the totals that each chunk reads, merged."""
    slots = None
    if far.merge == "slots" and totals is not None:
        slots = _slots(totals, key.dtype)
    near, lse = _softmax(far, backend, layout, query, key, value, keep, slots)
    if far.merge == "slots" or totals is None:
        return near
    queries = layout.queries(query)
    if far.merge == "gate":
        return _gated(far, layout, near, queries, totals, gate)
    numerator, mass, reference = far_field.mass_read(far, queries, totals)
    mass, reference = (layout.joined(x.unsqueeze(-1)) for x in (mass, reference))
    return _one_denominator(near, lse.unsqueeze(-1), layout.joined(numerator), mass, reference)


def _slots(totals: Totals, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys, mean values and log n of the slots. An empty one has logit -inf, gradient 0."""
    n, K, V = totals
    nothing = n < LEAST_HELD
    held = n.masked_fill(nothing, 1.0).unsqueeze(-1)
    keys = (K / held).masked_fill(nothing.unsqueeze(-1), 0.0)
    # NaN of future tokens, in a tile that earlier rows multiply by 0
    values = (V / held).masked_fill(~(n >= LEAST_HELD).unsqueeze(-1), 0.0)
    logits = held.squeeze(-1).log().masked_fill(nothing, -math.inf)
    return keys.to(dtype), values.to(dtype), logits


def _softmax(far, backend, layout, query, key, value, keep, slots) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over near keys and, where there are any, the chunk's own slots.

    The slots of all chunks lie before the keys and add one tile to each row.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    bias, lead, marks = None, 0, 0
    if keep is not None:
        bias = torch.zeros(keep.shape, dtype=wide, device=keep.device)
        bias = bias.masked_fill(~keep, -math.inf)[:, None, None]
    if slots is not None:
        marks, group = slots[0].shape[3], query.shape[1] // key.shape[1]
        slot_keys, slot_values, logits = (x.flatten(2, 3) for x in slots)
        count = slot_keys.shape[2]
        lead = -(-count // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        logits = pad(logits, (0, lead - count)).repeat_interleave(group, 1).unsqueeze(2)
        if bias is None:
            bias = pad(logits, (0, key.shape[2]))
        else:
            bias = torch.cat([logits, bias.expand(-1, query.shape[1], -1, -1)], 3)
        key, value = (
            torch.cat([pad(slot, (0, 0, 0, lead - count)), x], 2)
            for slot, x in ((slot_keys, key), (slot_values, value))
        )
    sizes = layout.window, marks, layout.first, lead, layout.rows, key.shape[2]
    whole = [operator.index(n) for n in sizes]  # symbols under torch.compile
    mask = BlockMask.from_tensors(*_packed_mask(whole, key.device))
    call = BlockSparseCall(
        unit_stride(query), unit_stride(key), unit_stride(value),
        block_mask_for(mask, 1, 1, layout.rows, key.shape[2], key.device), far.scale, bias,
        query_offset=layout.query_offset,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    out, lse, _ = BLOCK_SPARSE.run(call, backend)
    return out, lse


@constant_when_traced
def _packed_mask(sizes: list[int], device: torch.device) -> tuple[list[Tensor], list[int], str]:
    window, slots, first, lead, rows, keys = sizes
    expression = _expression(window, slots, first, lead)
    return pack_mask(compiled(expression, 1, 1, rows, keys, device))


@functools.lru_cache(maxsize=64)
def _expression(window: int, slots: int, first: int, lead: int) -> LocalChunks:
    """One object for equal masks: it keeps what was compiled for it."""
    return LocalChunks(window, slots, first, lead)


def _one_denominator(near, lse, numerator, mass, reference) -> Tensor:
    """(e^lse near + e^reference numerator) / (e^lse + e^reference mass); no far field where its
    mass is not positive.
    """
    dropped = ~(mass > 0)
    top = torch.maximum(lse, reference.masked_fill(dropped, -math.inf)).detach()
    top = top.masked_fill(top == -math.inf, 0.0)  # sees nothing
    own = torch.exp(lse - top)
    other = torch.exp((reference - top).masked_fill(dropped, -math.inf))
    total = own + other * mass
    out = own * near + other * numerator
    return (out / total.masked_fill(total == 0.0, 1.0)).to(near.dtype)


def _gated(far, layout, near, queries, totals, gate) -> Tensor:
    out = layout.joined(far_field.nystrom_read(far, queries, totals))
    anything = (totals[0] > -math.inf).any(-1)  # (B, Hkv, C)
    group = queries.shape[1] // anything.shape[1]
    anything = anything.repeat_interleave(group, 1)[..., None, None]
    anything = layout.joined(anything.expand(*queries.shape[:4], 1).to(torch.uint8)).bool()
    wide = torch.promote_types(near.dtype, torch.float32)
    gate = gate.to(wide).masked_fill(~anything, 1.0)
    return (gate * near + (1 - gate) * out).to(near.dtype)
