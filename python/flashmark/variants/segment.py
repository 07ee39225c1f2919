"""Segment landmarks with time-aligned triangular masks: causal Nyström without parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashmark.arguments import finite
from flashmark.autograd import under_autocast, without_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.variants.arguments import check_count, check_inputs, empty
from flashmark.variants.padding import without_padding
from flashmark.variants.segments import segment_masks, segment_means

NEG_INF = float("-inf")
WIDEST = 256  # of a value
LEAST_SHARE = 0.1  # of the finished segments' mass that is left when signs cancel
LEAST_SIZE, HUGE = 1e-6, 1e30


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    jitter: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
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
        backend: as for `flashmark.block_sparse_attention`, which computes B, F and the own segment.

    Returns:
        (B, Hq, N, Dv) in the dtype of `query`. Rows that see no key are 0. Finished segments are
        left out of a row, with gradient 0, where more than nine tenths of their mass cancel.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Where a landmark's query hardly reads its own segment, A_ll is small and the substitution
    magnifies what it approximates badly, and rounding with it: masses of either sign then cancel.
    Long segments average this out; with random tokens 16 are enough, 4 are not.

    Cost: N^2 / segment scores instead of N^2 / 2, and a solve of size N / segment, in float32 for
    half-precision inputs. The scheme is Nyströmformer's (Xiong et al., 2021) with causal landmarks.
    """
    query, key, value = under_autocast(query, key, value)
    check_inputs(query, key, value, key_mask)
    check_count("segment", segment)
    jitter = finite("jitter", jitter, positive=True)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    if not query.numel():
        return empty(query, value)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend(query, key, value, segment, scale, jitter, backend)

    with without_autocast(query.device.type):
        if key_mask is not None:
            return without_padding(attend, query, key, value, key_mask)
        return attend(query, key, value)


def _attend(query, key, value, segment, scale, jitter, backend) -> Tensor:
    def attend(query, key, value, mask, bias=None):
        return block_sparse_attention(
            query, key, value, mask, bias=bias, scale=scale, return_lse=True, backend=backend
        )

    masks = segment_masks(segment)
    near, near_lse = attend(query, key, value, masks.own)
    finished = max(query.shape[2] - 1, 0) // segment  # segments that some row can read
    if finished == 0:
        return near
    query, key, value = (x.to(near_lse.dtype) for x in (query, key, value))
    over = slice(0, finished * segment)
    lq, lk = (segment_means(x[:, :, over], finished)[0] for x in (query, key))
    lk = lk.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # summaries are a query head's
    R, L = attend(lq, key, value, masks.so_far)
    summaries, size = _substitute(scale * lq, lk, R, L, segment, jitter)
    # F A^-1 B as a softmax over landmarks that weigh F |z|; the size passes into the score
    bias = torch.where(size > 0, size.clamp_min(LEAST_SIZE).log(), -HUGE).unsqueeze(2)
    summaries = summaries / size.clamp_min(LEAST_SIZE).unsqueeze(-1)
    parts = [  # a value may be no wider than 256, and the mass is one more column of it
        attend(query, lk, part, masks.finished, bias) for part in summaries.split(WIDEST, -1)
    ]
    far, mass = torch.cat([out for out, _ in parts], -1).tensor_split([-1], -1)
    return _merge(near, near_lse, far, mass.squeeze(-1), parts[0][1])


def _substitute(lq, lk, R, L, segment, jitter) -> tuple[Tensor, Tensor]:
    """[x, z] = A^-1 B [v, 1], (B, Hq, L, Dv + 1), from B [v, 1] = e^L [R, 1]; and |z|, a constant.

    Landmarks that are not used have x = z = 0.
    """
    # Row l of both sides is divided by e^L_l. By convexity entries up to the diagonal are then at
    # most 1 / (tokens of segment m); those above it are another's future and may be anything.
    scores = lq @ lk.mT
    seen = L > NEG_INF
    below = torch.ones_like(scores, dtype=torch.bool).tril()
    scores = (scores - L.masked_fill(~seen, 0.0).unsqueeze(-1)).masked_fill(~below, NEG_INF)
    tokens = segment * torch.arange(1, L.shape[-1] + 1, dtype=L.dtype, device=L.device)
    A = torch.exp(scores) + torch.diag_embed(jitter / tokens)
    right = torch.cat([R, torch.ones_like(R[..., :1])], -1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)

    def solve(usable: Tensor) -> Tensor:
        rows = usable.unsqueeze(-1)
        return torch.linalg.solve_triangular(
            torch.where(rows, A, eye), right.masked_fill(~rows, 0.0), upper=False
        )

    # What is not finite is left out as well: a poisoned future must not reach the rows before it,
    # and 0 * NaN in a tile would carry it there.
    usable = seen & A.isfinite().all(-1) & right.isfinite().all(-1)
    with torch.no_grad():
        usable = usable & solve(usable).isfinite().all(-1)
    summaries = solve(usable)
    return summaries, summaries[..., -1].detach().abs()


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
