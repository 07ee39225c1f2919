"""A causal attention that leaks, to show what a leak looks like. Never train a model with it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from flashmark.arguments import finite
from flashmark.autograd import under_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import key_padding
from flashmark.variants.arguments import check_count, check_inputs, empty
from flashmark.variants.segments import segment_masks, segment_means


def leaky_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """NOT causal: every row reads the mean key and value of all segments that have begun.

    The mask looks causal, and no segment after the row's own is visible. But the mean of its own
    segment holds the tokens after it: this is what comes of putting bidirectional segment means,
    as Nyströmformer has them, into a causal model. A language model learns to read the next token
    there and its loss is too good to be true; `flashmark.check_causality` finds it at once.

    Args:
        query: (B, Hq, N, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, N, D), same dtype; Hq a multiple of Hkv.
        value: (B, Hkv, N, Dv), same dtype.
        num_landmarks: at most so many segments, of ceil(N / num_landmarks) tokens.
        scale: factor of every score; 1 / sqrt(D) when None.
        key_mask: bool (B, N), True where the token takes part.
        backend: as for `flashmark.block_sparse_attention`.

    Returns:
        (B, Hq, N, Dv) in the dtype of `query`.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    check_inputs(query, key, value, key_mask)
    check_count("num_landmarks", num_landmarks)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    if not query.numel():
        return empty(query, value)
    length = query.shape[2]
    segment = max(1, -(-length // num_landmarks))
    segments = -(-length // segment)
    beyond = segments * segment - length  # the last segment may be shorter
    mask = query.new_ones(query.shape[0], length, dtype=bool) if key_mask is None else key_mask
    mask = F.pad(mask, (0, beyond))
    (mean_key, sizes), (mean_value, _) = (
        segment_means(F.pad(x, (0, 0, 0, beyond)), segments, mask) for x in (key, value)
    )
    visible = segment_masks(segment).begun
    if key_mask is not None:
        visible = visible & key_padding(sizes.squeeze(1) > 0)
    means = mean_key.to(key.dtype), mean_value.to(value.dtype)
    return block_sparse_attention(query, *means, visible, scale=scale, backend=backend)
