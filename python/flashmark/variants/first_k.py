"""First-k landmarks: exact attention for the first tokens, landmarks from them for the rest."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from flashmark.arguments import finite
from flashmark.autograd import under_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import causal
from flashmark.nystrom.attention import NORMALIZATIONS, nystrom_attention
from flashmark.nystrom.checks import MAX_LANDMARKS
from flashmark.nystrom.landmark_core import landmark_core
from flashmark.variants.arguments import check_count, check_inputs, empty
from flashmark.variants.padding import without_padding
from flashmark.variants.segments import group_mean, segment_means


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
    backend: str = "auto",
) -> Tensor:
    """Causal attention, exact for the first k tokens; they are the landmarks of all later ones.

    Rows i < first are exact. Rows after them are `flashmark.nystrom_attention` over all tokens up
    to i, with landmarks that are means of consecutive runs of the first keys: they are known
    before the first row that reads them, so nothing of the future is used.

    Args:
        query: (B, Hq, N, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, N, D), same dtype; Hq a multiple of Hkv.
        value: (B, Hkv, N, Dv), same dtype.
        first: k >= 1; with k >= N all rows are exact.
        num_landmarks: 1 to min(k, 256) means; k when None: the first keys themselves.
        tied: landmark queries are the landmark keys, the better conditioned choice. False: they are
            means of the first queries, over the query heads of a group too.
        normalize: "landmark" or "mass", as for `flashmark.nystrom_attention`.
        scale: factor of every score; 1 / sqrt(D) when None.
        key_mask: bool (B, N), True where the token takes part. The others are as if they had been
            taken out before (the first k tokens are the first that take part), their rows are 0.
        backend: as for the two operators.

    Returns:
        (B, Hq, N, Dv) in the dtype of `query`. Rows that see no key are 0.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    check_inputs(query, key, value, key_mask)
    check_count("first", first)
    if num_landmarks is None:
        num_landmarks = first
    most = min(first, MAX_LANDMARKS)
    if check_count("num_landmarks", num_landmarks) > most:
        raise ValueError(f"num_landmarks: expected 1 to {most}, got {num_landmarks}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected 'landmark' or 'mass', got {normalize!r}")
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    if not query.numel():
        return empty(query, value)
    if key_mask is not None:
        attend = functools.partial(
            first_k_attention, first=first, num_landmarks=num_landmarks, tied=tied,
            normalize=normalize, scale=scale, backend=backend,
        )  # fmt: skip
        return without_padding(attend, query, key, value, key_mask)

    head = [x[:, :, :first] for x in (query, key, value)]
    exact = block_sparse_attention(*head, causal(), scale=scale, backend=backend)
    if first >= query.shape[2]:
        return exact

    lk, _ = segment_means(head[1], num_landmarks)
    lq = lk
    if not tied:
        lq, _ = segment_means(group_mean(head[0], key.shape[1]), num_landmarks)
    kind = "softmax" if normalize == "landmark" else "kernel"
    core = landmark_core(lq, None if tied else lk, scale=scale, kind=kind)
    landmarks = lk if tied else (lq, lk)
    options = {
        "core": core, "scale": scale, "normalize": normalize, "backend": backend,
    }  # fmt: skip
    _, state = nystrom_attention(  # no query: only what the first tokens leave behind
        query[:, :, :0], *head[1:], landmarks, **options, is_causal=False, return_state=True
    )
    tail = (x[:, :, first:] for x in (query, key, value))
    rest = nystrom_attention(*tail, landmarks, **options, state=state)
    return torch.cat([exact, rest], dim=2)
