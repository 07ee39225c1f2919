"""The definitions of the landmark family's other members, densely."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashmark.reference.block_sparse import block_sparse_attention
from flashmark.reference.nystrom import landmark_core, nystrom_attention

NEG_INF = float("-inf")
LEAST_SHARE = 0.1  # of its mass that the far field keeps when what landmarks hold cancels


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    jitter: float = 1e-4,
    backend: str = "reference",
) -> Tensor:
    """Exact attention within a segment, F A^-1 B over the finished ones, as
    `flashmark.variants.segment_attention`, computed densely. All of it in the dtype of `query`."""
    (_, heads, length, dim), kv_heads = query.shape, key.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if key_mask is not None:
        attend = functools.partial(segment_attention, segment=segment, scale=scale, jitter=jitter)
        return _each_alone(attend, query, key, value, key_mask)
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))

    time = torch.arange(length, device=query.device)
    landmark = torch.arange(max(length - 1, 0) // segment, device=query.device)
    mean = (time // segment == landmark[:, None]).to(query.dtype) / segment  # (L, N)
    lq, lk = mean @ query, mean @ key

    def scores(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
        return (scale * a @ b.mT).masked_fill(~seen, NEG_INF)

    own = (time // segment == time[:, None] // segment) & (time <= time[:, None])
    near = scores(query, key, own)
    f = scores(query, lk, landmark < time[:, None] // segment)
    a = scores(lq, lk, landmark <= landmark[:, None])
    b = scores(lq, key, time // segment <= landmark[:, None])

    # Row l of A and B may be divided by any number: here by the sum of row l of B.
    total = torch.logsumexp(b, -1, keepdim=True)
    A, B = torch.exp(a - total), torch.exp(b - total)
    A = A + torch.diag(jitter / (segment * (landmark + 1))).to(A.dtype)
    core_B = torch.linalg.inv(A.to(torch.promote_types(A.dtype, torch.float32))).to(A.dtype) @ B

    # Row i may be divided by any number as well: its largest exponential.
    top = torch.cat([near, f], -1).detach()
    top = top.amax(-1, keepdim=True) if top.shape[-1] else top.new_zeros(*top.shape[:-1], 1)
    top = top.masked_fill(top == NEG_INF, 0.0)
    F = torch.exp(f - top)
    far = F @ core_B
    # its mass, and what that would be if the masses of landmarks did not cancel
    far_mass, full = far.sum(-1, keepdim=True), F @ core_B.sum(-1, keepdim=True).abs()
    far = far.masked_fill(far_mass <= LEAST_SHARE * full, 0.0)
    weights = torch.exp(near - top) + far
    mass = weights.sum(-1, keepdim=True)
    return (weights @ value) / mass.masked_fill(mass == 0, 1.0)


def first_k_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int,
    num_landmarks: int | None = None,
    tied: bool = True,
    normalize: str = "landmark",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Exact causal rows before `first`, rows through the landmarks of those tokens afterwards, as
    `flashmark.variants.first_k_attention`."""
    (batch, _, length, _), kv_heads = query.shape, key.shape[1]
    time = torch.arange(length, device=query.device)
    visible = time <= time[:, None]
    if key_mask is not None:
        attend = functools.partial(
            first_k_attention, first=first, num_landmarks=num_landmarks, tied=tied,
            normalize=normalize, scale=scale,
        )  # fmt: skip
        return _each_alone(attend, query, key, value, key_mask)
    exact = block_sparse_attention(query, key, value, visible.expand(batch, 1, -1, -1), scale=scale)
    if first >= length:
        return exact
    mean = _means(first, num_landmarks or first, None, query)
    landmarks = mean @ key[:, :, :first]
    if not tied:
        landmarks = mean @ _over_groups(query, kv_heads)[:, :, :first], landmarks
    rest = nystrom_attention(query, key, value, landmarks, scale=scale, normalize=normalize)
    return torch.where((time < first)[:, None], exact, rest)


def nystromformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int,
    conv_weight: Tensor | None = None,
    inverse: str = "exact",
    iterations: int = 6,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    pool_padding: bool = True,
    backend: str = "reference",
) -> Tensor:
    """softmax(q k~^T) Z softmax(q~ k^T) v + conv(v), as
    `flashmark.variants.nystromformer_attention`, computed densely, in the dtype of `query`."""
    (batch, heads, length, dim), kv_heads = query.shape, key.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    visible = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    visible = (visible if key_mask is None else key_mask)[:, None, None]
    pooled = None if pool_padding else key_mask
    if pooled is not None:
        key, value = (x.masked_fill(~pooled[:, None, :, None], 0.0) for x in (key, value))

    if length <= num_landmarks:
        out = block_sparse_attention(
            query, key, value, visible.expand(-1, -1, length, -1), scale=scale
        )
    else:
        mean = _means(length, num_landmarks, pooled, query)
        lq, lk = mean @ _over_groups(query, kv_heads), mean @ key
        A = torch.softmax(scale * lq @ lk.mT, -1)
        if inverse == "tikhonov":
            wide = torch.promote_types(A.dtype, torch.float32)
            Z = landmark_core(lq.to(wide), lk.to(wide), scale).to(A.dtype)
        else:
            sums = A.sum(-2)
            largest = sums.max() if inverse == "original" else sums.amax(-1)[..., None, None]
            Z, eye = A.mT / largest, torch.eye(num_landmarks, dtype=A.dtype, device=A.device)
            for _ in range(iterations):
                AZ = A @ Z
                Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
        empty = ~visible.any(-1, keepdim=True)
        B = (scale * lq @ key.mT).masked_fill(~visible & ~empty, NEG_INF)
        B = torch.softmax(B, -1).masked_fill(empty, 0.0)
        F = torch.softmax(scale * query @ _each(lk, heads).mT, -1)
        out = F @ _each(Z @ (B @ value), heads)
    if conv_weight is None:
        return out
    taps = conv_weight.reshape(kv_heads, -1).to(
        value.dtype
    )  # tap t of row i reads row i + t - K//2
    t = torch.arange(length, device=value.device)
    offset = t - t[:, None] + taps.shape[1] // 2
    inside = (offset >= 0) & (offset < taps.shape[1])
    band = torch.where(inside, taps[:, offset.clamp(0, taps.shape[1] - 1)], 0.0)  # (Hkv, N, N)
    return out + _each(band @ value, heads)


def sequence_to_sequence_attention(
    source: tuple[Tensor, Tensor, Tensor],
    target: tuple[Tensor, Tensor, Tensor],
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    joint: bool = False,
    core: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "landmark",
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(S1, S2, S3) or, with `joint`, (S1, None, [S2 S3] as one attention), as
    `flashmark.variants.sequence_to_sequence_attention`, from all keys of the source."""
    options = {"core": core, "scale": scale, "normalize": normalize}
    bidirectional = options | {"is_causal": False, "key_mask": source_mask}
    source_out = nystrom_attention(*source, landmarks, **bidirectional)
    if not joint:
        cross = nystrom_attention(target[0], *source[1:], landmarks, **bidirectional)
        target_out = nystrom_attention(*target, landmarks, key_mask=target_mask, **options)
        return source_out, cross, target_out
    # one causal sequence, whose source rows are not used
    both = [torch.cat(pair, dim=2) for pair in zip(source, target, strict=True)]
    mask = torch.cat(
        [
            torch.ones(len(x[0]), x[0].shape[2], dtype=torch.bool) if mask is None else mask
            for x, mask in ((source, source_mask), (target, target_mask))
        ],
        dim=1,
    )
    out = nystrom_attention(*both, landmarks, key_mask=mask.to(both[0].device), **options)
    return source_out, None, out[:, :, source[0].shape[2] :]


def _means(length: int, segments: int, key_mask: Tensor | None, like: Tensor) -> Tensor:
    """(1 or B, 1, segments, length): row s times x is the mean of x over segment s, where the last
    length % segments of them are one token longer than the others."""
    size, longer = divmod(length, segments)
    sizes = torch.full((segments,), size, device=like.device)
    sizes[segments - longer :] += 1
    of_token = torch.arange(segments, device=like.device).repeat_interleave(sizes)
    member = (of_token == torch.arange(segments, device=like.device)[:, None])[None]
    if key_mask is not None:
        member = member & key_mask[:, None]
    member = member.to(like.dtype).unsqueeze(1)
    return member / member.sum(-1, keepdim=True).clamp_min(1)


def _over_groups(query: Tensor, kv_heads: int) -> Tensor:
    return query.unflatten(1, (kv_heads, -1)).mean(2)


def _each(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for the query heads that share them."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _each_alone(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor
) -> Tensor:
    """Each sample without the tokens that `key_mask` leaves out, whose rows are 0."""
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    rows = []
    for sample, kept in enumerate(key_mask):
        alone = (x[sample : sample + 1, :, kept] for x in (query, key, value))
        place = kept.nonzero()[:, 0]
        rows.append(out[sample].index_copy(1, place, attend(*alone)[0]))
    return torch.stack(rows) if rows else out
