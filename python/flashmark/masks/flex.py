"""To and from FlexAttention's BlockMask."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.masks.block_mask import BlockMask
from flashmark.masks.compile import compile_mask
from flashmark.masks.data import blocks
from flashmark.masks.expression import Mask
from flashmark.masks.functions import mask_mod

#: FlexAttention keeps four dense index lists of (batch, heads, q_blocks, kv_blocks)
MAX_FLEX_TILES = 1 << 24


def from_flex(block_mask) -> BlockMask:
    """A BlockMask equal to FlexAttention's, for the same (batch, heads, q_len, kv_len). Its block
    size is the largest that divides FlexAttention's (16 to 128).

    Its partial tiles are evaluated with its `mask_mod`, its full tiles taken as they are.

    Raises:
        TypeError: `block_mask` is not a FlexAttention BlockMask.
        ValueError: its block size is not a multiple of 16.
    """
    if not hasattr(block_mask, "kv_indices") or not hasattr(block_mask, "mask_mod"):
        raise TypeError(
            f"block_mask: expected a FlexAttention BlockMask, got {type(block_mask).__name__}"
        )
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    q_len, kv_len = block_mask.seq_lengths
    device = block_mask.kv_num_blocks.device
    size = tuple(block_mask.BLOCK_SIZE)
    listed = _listed_tiles(block_mask.kv_num_blocks, block_mask.kv_indices)
    grid = (-(-q_len // size[0]), -(-kv_len // size[1]))
    mask: Mask = blocks(listed[..., : grid[0], : grid[1]], size)
    mask = mask & mask_mod(block_mask.mask_mod)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed_tiles(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        mask = mask | blocks(full[..., : grid[0], : grid[1]], size)
    return compile_mask(
        mask, batch, heads, q_len, kv_len, device=device, block_size=mask.block_size()
    )


def _listed_tiles(counts: Tensor, indices: Tensor) -> Tensor:
    """Dense bool (batch, heads, q_blocks, kv_blocks) from counts and index lists."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    member = place < counts.unsqueeze(-1)
    tiles = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return tiles.scatter_add_(-1, indices.long(), member.int()) > 0


def to_flex(mask: BlockMask):
    """FlexAttention's BlockMask with the same visible elements.

    Raises:
        TypeError: `mask` is not a compiled BlockMask.
        ValueError: more than 2^24 tiles, whose dense index lists would not be reasonable to build.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask: expected a compiled BlockMask, got {type(mask).__name__}")
    tiles = mask.batch * mask.heads * mask.q_blocks * mask.kv_blocks
    if tiles > MAX_FLEX_TILES:
        raise ValueError(f"mask: expected at most {MAX_FLEX_TILES} tiles for to_flex, got {tiles}")
    grid, words = mask.tile_grid(), mask.tile_bits
    if words.shape[0] == 0:
        words = words.new_zeros(1, *words.shape[1:])
    block_q, block_kv, batch, heads = mask.block_q, mask.block_kv, mask.batch, mask.heads

    def from_tile_bits(b, h, q_idx, kv_idx):
        tile = grid[
            b if batch > 1 else 0, h if heads > 1 else 0, q_idx // block_q, kv_idx // block_kv
        ]
        k = kv_idx % block_kv
        word = words[tile.clamp(min=0), q_idx % block_q, k // 32]
        return (tile == -1) | ((tile >= 0) & ((word >> (k % 32)) & 1 == 1))

    partial, full = (_index_lists(tile) for tile in (grid >= 0, grid == -1))
    return FlexBlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=from_tile_bits,
        seq_lengths=(mask.q_len, mask.kv_len),
    )


def _index_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    counts = tiles.sum(-1, dtype=torch.int32)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return counts, order.int()
