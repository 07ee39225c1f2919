"""Tokens that `key_mask` leaves out, taken out of a causal attention and put back as zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def without_padding(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor
) -> Tensor:
    """`attend(query, key, value)` of the tokens that take part; the rows of the others are 0.

    They are moved to the end, where no causal row sees them: padding on the left, padding on the
    right and holes give what the sample gives alone.
    """
    order = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)

    def at(x: Tensor) -> Tensor:
        return order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])

    hidden = ~key_mask[:, None, :, None]
    out = attend(*(x.masked_fill(hidden, 0.0).gather(2, at(x)) for x in (query, key, value)))
    return torch.zeros_like(out).scatter(2, at(out), out).masked_fill(hidden, 0.0)
