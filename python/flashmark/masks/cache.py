"""Compiled masks, kept on the expression they came from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flashmark.masks.arguments import four_dims
from flashmark.masks.block_mask import BlockMask
from flashmark.masks.compile import compile_mask
from flashmark.masks.data import dense
from flashmark.masks.expression import Mask

ENTRIES = 16


def compiled(
    mask: Mask,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
) -> BlockMask:
    """`compile_mask`, remembered for a few shapes until a tensor in the mask changes in place."""
    tensors = mask.tensors()
    sizes, block_size = (batch, heads, q_len, kv_len), mask.block_size()
    if any(t.is_inference() for t in tensors):  # they do not count their changes
        return compile_mask(mask, *sizes, device=device, block_size=block_size)
    versions = tuple(t._version for t in tensors)
    leading = mask.dims(batch, heads) if mask.closed_form else (batch, heads)
    entry = (leading, q_len, kv_len, device, versions)
    cache: dict = mask.__dict__.setdefault("_compiled", {})
    if entry not in cache:
        if len(cache) >= ENTRIES:
            cache.pop(next(iter(cache)))
        with torch.inference_mode(False):  # what is kept must serve training as well
            cache[entry] = compile_mask(mask, *sizes, device=device, block_size=block_size)
    return cache[entry]


_of_tensors: WeakIdKeyDictionary = WeakIdKeyDictionary()


def compiled_tensor(visible: Tensor) -> BlockMask:
    """The BlockMask of a bool tensor (..., Nq, Nk) of 2 to 4 dimensions, remembered as long as the
    tensor lives and keeps its version."""
    version = None if visible.is_inference() else visible._version
    known = _of_tensors.get(visible)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    visible_of_all = four_dims("visible", visible)
    with torch.inference_mode(False):
        result = compile_mask(dense(visible), *visible_of_all.shape, device=visible.device)
    _of_tensors[visible] = version, result
    return result
