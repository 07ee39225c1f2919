"""Near field and far totals into one output: the three merges of hybrid attention."""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashmark.block_sparse import block_sparse_attention
from flashmark.hybrid import far_field
from flashmark.hybrid.far_field import Totals
from flashmark.masks import BlockMask
from flashmark.masks.block_mask import pack_mask
from flashmark.masks.cache import compiled
from flashmark.masks.positions import LocalChunks
from flashmark.tracing import constant_when_traced

LEAST_HELD = 1e-30  # a slot that holds less holds nothing
SLOT_ALIGNMENT = 128  # slots end, and tokens begin, where a tile does


def attend(far, backend, layout, query, key, value, gate, keep, totals) -> Tensor:
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
    # not a number: of tokens to come, in a tile that earlier rows multiply by 0
    values = (V / held).masked_fill(~(n >= LEAST_HELD).unsqueeze(-1), 0.0)
    logits = held.squeeze(-1).log().masked_fill(nothing, -math.inf)
    return keys.to(dtype), values.to(dtype), logits


def _softmax(far, backend, layout, query, key, value, keep, slots) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over near keys and, where there are any, the chunk's own slots.

    The slots of all chunks lie ahead of the keys: a tile more to each row.
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
    return block_sparse_attention(
        query, key, value, mask, bias=bias, scale=far.scale, query_offset=layout.query_offset,
        return_lse=True, backend=backend,
    )  # fmt: skip


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
