"""Mask expressions and their compiled form."""

from flashmark.masks.block_mask import BlockMask
from flashmark.masks.compile import compile_mask
from flashmark.masks.data import blocks, dense, documents, key_padding, mask_mod
from flashmark.masks.expression import Mask
from flashmark.masks.flex import from_flex, to_flex
from flashmark.masks.positions import (
    causal,
    diagonal,
    dilated,
    local_chunks,
    pinned,
    prefix,
    sliding_window,
)

__all__ = [
    "BlockMask",
    "Mask",
    "blocks",
    "causal",
    "compile_mask",
    "dense",
    "diagonal",
    "dilated",
    "documents",
    "from_flex",
    "key_padding",
    "local_chunks",
    "mask_mod",
    "pinned",
    "prefix",
    "sliding_window",
    "to_flex",
]
