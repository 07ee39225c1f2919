"""Mask expressions and their compiled form."""

from flashmark.masks.block_mask import BlockMask
from flashmark.masks.compile import compile_mask
from flashmark.masks.data import blocks, dense, key_padding
from flashmark.masks.expression import Mask
from flashmark.masks.flex import from_flex, to_flex
from flashmark.masks.functions import mask_mod
from flashmark.masks.loading import register
from flashmark.masks.packed import documents, packed
from flashmark.masks.positions import (
    causal,
    diagonal,
    dilated,
    local_chunks,
    pinned,
    prefix,
    sliding_window,
)

register()

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
    "packed",
    "pinned",
    "prefix",
    "sliding_window",
    "to_flex",
]
