"""Masks in files and data loaders: `torch.load(weights_only=True)` and `default_collate`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from flashmark.masks.block_mask import BlockMask, TileLists
from flashmark.masks.data import Blocks, Dense, KeyVisible
from flashmark.masks.expression import And, Mask, Not, Or
from flashmark.masks.packed import Documents, Packed
from flashmark.masks.positions import Band, Dilated, LocalChunks, Prefix

#: all but functions: they hold tensors and numbers only
SAFE: list[Any] = [
    *(BlockMask, TileLists, And, Or, Not, Band, Dilated, LocalChunks, Prefix),
    *(Documents, Packed, KeyVisible, Blocks, Dense),
]


def _collate_block_masks(samples: list[BlockMask], **_: Any) -> BlockMask:
    return BlockMask.cat(samples)


def _collate_expressions(samples: list[Mask], **_: Any) -> Mask:
    first = samples[0]
    if first.formula is not None and all(m.formula == first.formula for m in samples):
        return first
    raise TypeError(
        "mask: expected equal expressions of positions in one batch, got "
        f"{first!r} and others; compile_mask each sample's, or build one of the collated tensors"
    )


def register() -> None:
    torch.serialization.add_safe_globals(SAFE)
    default_collate_fn_map[BlockMask] = _collate_block_masks
    default_collate_fn_map[Mask] = _collate_expressions
