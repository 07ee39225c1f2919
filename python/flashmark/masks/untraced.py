"""Masks that torch.compile cannot keep. Imported while it traces: the decorator imports Dynamo."""

from __future__ import annotations

import torch

from flashmark.masks.block_mask import BlockMask
from flashmark.masks.compile import compile_mask
from flashmark.masks.expression import Mask


@torch.compiler.disable(
    reason="mask: an expression that reads tensors or calls a function is evaluated at each call, "
    "outside the graph; for one graph pass a BlockMask from flashmark.compile_mask"
)
def evaluated(mask: Mask, sizes: tuple[int, int, int, int], device: torch.device) -> BlockMask:
    """`compile_mask` between two graphs."""
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            "mask: expected a BlockMask from compile_mask inside torch.export, got an expression "
            "that reads tensors or calls a function"
        )
    return compile_mask(mask, *sizes, device=device, block_size=mask.block_size())
