"""Many places in one call, without a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.generation.prompts import CachedModel
from flashmark.masks import Mask
from flashmark.models.layers import check_key_mask


@torch.no_grad()
def predict_in_parallel(
    model: CachedModel,
    prefix: Tensor,
    places: Tensor,
    *,
    key_mask: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Logits (B, K, V) for each of `places` (B, K) after `prefix` (B, P), all in one call.

    Places hold tokens: candidates whose continuation is asked for, or a placeholder for what is to
    stand there. The model is one trained with `masks.pinned(P)`, where each place sees the prefix
    and itself: its prediction for one place does not depend on the other places of the call.

    Args:
        model: a decoder, or what `given` makes of one with an encoder's output.
        prefix: (B, P) tokens that all places see.
        places: (B, K) tokens.
        key_mask: bool (B, P), False where a prefix is padded, on either side. Prefixes of different
            lengths need a mask that knows them, such as `masks.pinned(key_mask.sum(1))`.
        mask: what is visible in this call; the model's own mask when None. Its rows and columns
            count the tokens that take part.
    """
    if prefix.shape[:1] != places.shape[:1]:
        raise ValueError(
            f"places: expected a batch of {prefix.shape[0]} like prefix, got {places.shape[0]}"
        )
    check_key_mask("key_mask", key_mask, prefix)
    options = {} if mask is None else {"mask": mask}
    if key_mask is not None:
        everywhere = torch.ones_like(places, dtype=torch.bool)
        options["key_mask"] = torch.cat([key_mask, everywhere], dim=1)
    return model(torch.cat([prefix, places], dim=1), **options)[:, prefix.shape[1] :]
