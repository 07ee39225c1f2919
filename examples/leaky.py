"""A causal attention that leaks, to show how a leak appears. Never train a model with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import flashmark
from flashmark.masks import mask_mod


def leaky_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_landmarks: int, backend: str = "auto"
) -> Tensor:
    """NOT causal: every row reads the mean key and value of all segments that have begun.

    The mask looks causal, and no segment after the row's own is visible. But the mean of its own
    segment holds the tokens after it: this is what comes of putting bidirectional segment means,
    as Nyströmformer has them, into a causal model. A language model learns to read the next token
    there and its loss is too good to be true; `flashmark.check_causality` finds it at once.

    Args:
        query: (B, Hq, N, D).
        key, value: (B, Hkv, N, D) and (B, Hkv, N, Dv).
        num_landmarks: at most so many segments, of ceil(N / num_landmarks) tokens.

    Returns:
        (B, Hq, N, Dv).
    """
    length = query.shape[2]
    segment = max(1, -(-length // num_landmarks))
    beyond = -length % segment  # the last segment may be shorter

    def means(x: Tensor) -> Tensor:
        segments = F.pad(x, (0, 0, 0, beyond)).unflatten(2, (-1, segment))
        sizes = F.pad(x.new_ones(length), (0, beyond)).unflatten(0, (-1, segment)).sum(1)
        return segments.sum(3) / sizes[:, None]

    begun = mask_mod(lambda batch, head, row, landmark: landmark <= row // segment)
    return flashmark.block_sparse_attention(query, means(key), means(value), begun, backend=backend)
