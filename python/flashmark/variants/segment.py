"""Segment landmarks with time-aligned triangular masks: causal Nyström without parameters."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import check_count, finite
from flashmark.autograd import under_autocast, without_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import BlockMask, Mask, causal
from flashmark.masks.cache import compiled
from flashmark.variants.arguments import check_inputs, empty
from flashmark.variants.padding import without_padding
from flashmark.variants.segments import segment_masks, segment_means

NEG_INF = float("-inf")
WIDEST = 256  # of a value
LEAST_SHARE = 0.1  # of the finished segments' mass that is left when signs cancel
LEAST_SIZE, HUGE = 1e-6, 1e30


class SegmentState(NamedTuple):
    """All that segment attention keeps of the n tokens it has consumed, of whose segments
    L = n // segment are over. It grows with n: every later landmark reads all keys.
    """

    query: Tensor  # (B, Hq, n % segment, D), of the unfinished segment
    key: Tensor  # (B, Hkv, n, D)
    value: Tensor  # (B, Hkv, n, Dv)
    landmarks: Tensor  # (B, Hkv, L, D), mean keys; like `summaries` at least float32
    summaries: Tensor  # (B, Hq, L, Dv + 1), rows of A^-1 B [v, 1]; 0 where one is not used
    overflowed: Tensor  # bool (B, Hq): a row of these was not finite, so no later one is used


torch.serialization.add_safe_globals([SegmentState])  # for torch.load, weights_only=True


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    jitter: float = 1e-4,
    state: SegmentState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, SegmentState]:
    """Causal Nyström attention whose landmarks are the means of finished segments.

    Tokens are cut into segments of `segment`. Landmark l is the mean query q~_l and the mean key
    k~_l of segment l, and may be used when that segment is over. With

        F_il = exp(q_i . k~_l)     for segments l that are over before the segment of i begins
        A_lm = exp(q~_l . k~_m)    m <= l
        B_lj = exp(q~_l . k_j)     keys j up to the end of segment l

    the attention of row i to finished segments is approximated by F A^-1 B, and to its own segment
    it is exact: out_i = (F A^-1 B v + sum_own exp(q_i . k_j) v_j) / (the same with v = 1). A is
    lower triangular, so A^-1 is a substitution and column l depends on nothing after segment l.

    Args:
        query: (B, Hq, N, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, N, D), same dtype; Hq a multiple of Hkv.
        value: (B, Hkv, N, Dv), same dtype.
        segment: tokens of a segment, >= 1. The last may be shorter: it is never a landmark.
        scale: factor of every score; 1 / sqrt(D) when None.
        key_mask: bool (B, N), True where the token takes part. The others are as if they had been
            taken out before segments are cut, their rows are 0.
        jitter: > 0, added to A_ll in units of the mean of row l of B, so that none vanishes.
        state: what the tokens before left, from `return_state` with the same options;
            differentiable. Not together with `key_mask`.
        return_state: also return the state after the last token.
        backend: as for `flashmark.block_sparse_attention`, which computes B, F and the own segment.

    Returns:
        (B, Hq, N, Dv) in the dtype of `query`; with `return_state` also a SegmentState. Rows that
        see no key are 0. Any split of a sequence into calls gives the same outputs. Finished
        segments are left out of a row, with gradient 0, where more than nine tenths of their mass
        cancel.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Where a landmark's query hardly reads its own segment, A_ll is small and the substitution
    magnifies what it approximates badly, and rounding with it: masses of either sign then cancel.
    Long segments average this out; with random tokens 16 are enough, 4 are not.

    Cost: N^2 / segment scores instead of N^2 / 2, and a solve of size N / segment, in float32 for
    half-precision inputs. A token that goes on from a state reads its own segment and the
    landmarks; the last one of a segment also all keys. The scheme is Nyströmformer's (Xiong et al.,
    2021) with causal landmarks.
    """
    query, key, value = under_autocast(query, key, value)
    check_inputs(query, key, value, key_mask)
    segment = check_count("segment", segment)
    jitter = finite("jitter", jitter, positive=True)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    if key_mask is not None and (state is not None or return_state):
        raise ValueError("key_mask: expected None with a state, got a tensor")
    if state is not None:
        _check_state(state, segment, query, key, value)
    elif return_state:
        state = _empty_state(query, key, value)
    if not query.numel():
        out = empty(query, value)
        return (out, state) if return_state and state is not None else out
    attend = functools.partial(
        _attend, segment=segment, scale=scale, jitter=jitter, backend=backend
    )
    with without_autocast(query.device.type):
        if key_mask is not None:
            return without_padding(lambda *x: attend(*x)[0], query, key, value, key_mask)
        out, state = attend(query, key, value, state, return_state)
    return out if state is None else (out, state)


def _attend(
    query, key, value, state=None, return_state=False, *, segment, scale, jitter, backend
) -> tuple[Tensor, SegmentState | None]:
    def attend(query, key, value, mask, bias=None, offset=None):
        return block_sparse_attention(
            query, key, value, mask, bias=bias, query_offset=offset, scale=scale, return_lse=True,
            backend=backend,
        )  # fmt: skip

    masks, queries, past = segment_masks(segment), query, 0
    if state is not None:
        past = state.key.shape[2]
        queries = torch.cat([state.query, query], 2)  # from the start of their segment on
        key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
    total, begin, held = key.shape[2], past - past % segment, past // segment
    own = [x[:, :, begin:] for x in (key, value)]
    if past and total - begin <= segment:
        near, near_lse = attend(query, *own, causal())
    else:
        near, near_lse = attend(query, *own, masks.own, offset=past - begin or None)

    read = max(total - 1, 0) // segment  # segments that some row can read
    over = total // segment if return_state else read
    wide, group = near_lse.dtype, query.shape[1] // key.shape[1]
    lk, summaries, overflowed = (None, None, None) if state is None else state[3:]
    if over > held:
        ended = (over - held) * segment
        lq, means = (
            segment_means(x[:, :, :ended].to(wide), over - held)[0] for x in (queries, own[0])
        )
        lk = means if lk is None else torch.cat([lk, means], 2)
        every = lk.repeat_interleave(group, 1)  # summaries are a query head's
        seen = [x[:, :, : over * segment].to(wide) for x in (key, value)]
        whole = over - held == 1
        mask, offset = _rows_from(held, masks.so_far, whole, (over, over * segment), key.device)
        R, L = attend(lq, *seen, mask, offset=offset)
        summaries, overflowed = _substitute(
            scale * lq, every, R, L, segment, jitter, summaries, overflowed
        )
    out = near
    if read:
        mask, offset = _rows_from(past, masks.finished, held == read, (total, read), key.device)
        out = _with_far(
            functools.partial(attend, mask=mask, offset=offset), query.to(wide),
            lk[:, :, :read].repeat_interleave(group, 1), summaries[:, :, :read], near, near_lse,
        )  # fmt: skip
    if not return_state:
        return out, None
    assert lk is not None and summaries is not None and overflowed is not None
    rest = queries[:, :, queries.shape[2] - total % segment :].clone()
    return out, SegmentState(rest, key, value, lk, summaries, overflowed)


def _rows_from(
    first: int, mask: Mask, sees_all: bool, sizes: tuple[int, int], device: torch.device
) -> tuple[Mask | BlockMask | None, int | None]:
    """(mask, query_offset) of the rows from `first` on, of a mask of these sizes."""
    if first == 0:
        return mask, None
    return (None, None) if sees_all else (compiled(mask, 1, 1, *sizes, device), first)


def _with_far(attend, query, landmarks, summaries, near, near_lse) -> Tensor:
    """F A^-1 B as a softmax over landmarks that weigh F |z|, joined to the own segment."""
    size = summaries[..., -1].detach().abs()  # passes into the score
    bias = torch.where(size > 0, size.clamp_min(LEAST_SIZE).log(), -HUGE).unsqueeze(2)
    summaries = summaries / size.clamp_min(LEAST_SIZE).unsqueeze(-1)
    parts = [  # a value may be no wider than 256, and the mass is one more column of it
        attend(query, landmarks, part, bias=bias) for part in summaries.split(WIDEST, -1)
    ]
    far, mass = torch.cat([out for out, _ in parts], -1).tensor_split([-1], -1)
    return _merge(near, near_lse, far, mass.squeeze(-1), parts[0][1])


def _substitute(
    lq, lk, R, L, segment, jitter, held: Tensor | None, overflowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[x, z] = A^-1 B [v, 1], (B, Hq, L, Dv + 1), from B [v, 1] = e^L [R, 1] of the last rows and
    from `held`, the rows of x before them; and whether a row was not finite, (B, Hq).

    Landmarks that are not used have x = z = 0.
    """
    # Row l of both sides is divided by e^L_l. By convexity entries up to the diagonal are then at
    # most 1 / (tokens of segment m); those above it are another's future and may be anything.
    first = 0 if held is None else held.shape[2]
    scores = lq @ lk.mT
    seen = L > NEG_INF
    below = torch.ones_like(scores, dtype=torch.bool).tril(first)
    scores = (scores - L.masked_fill(~seen, 0.0).unsqueeze(-1)).masked_fill(~below, NEG_INF)
    count = first + torch.arange(1, L.shape[-1] + 1, dtype=L.dtype, device=L.device)
    A = torch.exp(scores)
    right = torch.cat([R, torch.ones_like(R[..., :1])], -1)
    # What is not finite is left out as well: a poisoned future must not reach the rows before it,
    # and 0 * NaN in a tile would carry it there.
    usable = seen & A.isfinite().all(-1) & right.isfinite().all(-1)
    if first:
        before, A = A.tensor_split([first], -1)
        right = right - before.masked_fill(~usable.unsqueeze(-1), 0.0) @ held
    A = A + torch.diag_embed(jitter / (segment * count))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)

    def solve(usable: Tensor) -> Tensor:
        rows = usable.unsqueeze(-1)
        return torch.linalg.solve_triangular(
            torch.where(rows, A, eye), right.masked_fill(~rows, 0.0), upper=False
        )

    with torch.no_grad():
        kept = usable & solve(usable).isfinite().all(-1)
        if overflowed is not None:
            kept = kept & ~overflowed.unsqueeze(-1)
        ended = (usable & ~kept).any(-1)
        if overflowed is not None:
            ended = ended | overflowed
    summaries = solve(kept)
    return (summaries if held is None else torch.cat([held, summaries], 2)), ended


def _empty_state(query: Tensor, key: Tensor, value: Tensor) -> SegmentState:
    wide = torch.promote_types(query.dtype, torch.float32)
    return SegmentState(
        query[:, :, :0], key[:, :, :0], value[:, :, :0], key[:, :, :0].to(wide),
        value.new_zeros(*query.shape[:2], 0, value.shape[3] + 1, dtype=wide),
        value.new_zeros(query.shape[:2], dtype=torch.bool),
    )  # fmt: skip


def _check_state(
    state: SegmentState, segment: int, query: Tensor, key: Tensor, value: Tensor
) -> None:
    if not isinstance(state, SegmentState):
        raise TypeError(f"state: expected a SegmentState, got {type(state).__name__}")
    length = state.key.shape[2]
    held = length % segment, length // segment
    if held != (state.query.shape[2], state.landmarks.shape[2]):
        raise ValueError(
            f"state: expected one made with segment={segment}, got {state.landmarks.shape[2]} "
            f"segments and {state.query.shape[2]} tokens of {length}"
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    kv, heads = key.shape[:2], query.shape[:2]
    expected = {
        "query": ((*heads, held[0], query.shape[3]), query.dtype),
        "key": ((*kv, length, key.shape[3]), query.dtype),
        "value": ((*kv, length, value.shape[3]), query.dtype),
        "landmarks": ((*kv, held[1], key.shape[3]), wide),
        "summaries": ((*heads, held[1], value.shape[3] + 1), wide),
        "overflowed": (tuple(heads), torch.bool),
    }
    for (name, (shape, dtype)), found in zip(expected.items(), state, strict=True):
        if found.shape != shape or found.device != query.device:
            raise ValueError(
                f"state.{name}: expected shape {shape} on {query.device}, "
                f"got {tuple(found.shape)} on {found.device}"
            )
        if found.dtype != dtype:
            raise TypeError(f"state.{name}: expected {dtype}, got {found.dtype}")


def _merge(near, near_lse, far, mass, far_lse) -> Tensor:
    """One denominator for the own segment and, where enough mass is left, for the others."""
    left_out = (far_lse == NEG_INF) | (mass <= LEAST_SHARE)
    far_lse = far_lse.masked_fill(left_out, NEG_INF)
    top = torch.maximum(near_lse, far_lse).detach()
    top = top.masked_fill(top == NEG_INF, 0.0)
    near_weight, far_weight = torch.exp(near_lse - top), torch.exp(far_lse - top)
    total = near_weight + far_weight * mass.masked_fill(left_out, 0.0)
    out = near_weight.unsqueeze(-1) * near + far_weight.unsqueeze(-1) * far.masked_fill(
        left_out.unsqueeze(-1), 0.0
    )
    return (out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)).to(near.dtype)
