"""What the autograd boundaries of all operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as `scaled_dot_product_attention` does."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x for x in tensors
    )


_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, each its own object: torch.compile refuses one that is passed twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(x.view_as(x) for x in tensors)


def unit_stride(x: Tensor) -> Tensor:
    """The same tensor where its last dimension is contiguous, else a copy: what backends expect."""
    return x if x.stride(-1) == 1 else x.contiguous()
