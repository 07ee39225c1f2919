"""A call as one pass sees it: its config, the sizes of its launch, and its static features."""

from __future__ import annotations

import dataclasses
import functools

import triton
from torch import Tensor

from flashmark.masks.block_mask import BlockMask

from . import configs
from .arguments import REMEMBERED, Features, KernelArguments, LaunchSizes

# keys and values of pairs that run side by side should fit in about half of a Hopper's L2
L2_BYTES = 24 << 20


def choose_config(pass_: str, query: Tensor, call: KernelArguments) -> configs.Config:
    """The config of one pass over these operands."""
    features = call.features
    block = (features.BLOCK_Q, features.BLOCK_KV) if features.KIND == "sparse" else None
    extras = features.BIAS != "none" or features.DROPOUT or features.SOFTCAP
    head_dim = max(features.PAD, features.PAD_V)
    arch = configs.device_arch(query.device)
    exact = features.PRECISION == "ieee"
    return configs.choose(arch, query.dtype, head_dim, block, pass_, extras, exact)


def choose_gluon(pass_: str, call: KernelArguments) -> configs.Config:
    """The config of a Gluon kernel of the backward pass."""
    features = call.features
    block = (features.BLOCK_Q, features.BLOCK_KV) if features.KIND == "sparse" else None
    return configs.hopper_backward(pass_, block)


def over_queries(
    call: KernelArguments, mask: BlockMask, query: Tensor, config: configs.Config
) -> tuple[LaunchSizes, Features]:
    """A call as seen by a kernel that holds a tile of queries and walks keys."""
    lines, itemsize = (mask.batch, mask.heads), query.element_size()
    return _over_queries(call.sizes, call.features, query.shape[:2], lines, itemsize, config)


@functools.lru_cache(REMEMBERED)
def _over_queries(
    sizes: LaunchSizes,
    features: Features,
    batch_heads: tuple[int, int],
    lines: tuple[int, int],
    itemsize: int,
    config: configs.Config,
) -> tuple[LaunchSizes, Features]:
    """`over_queries` without tensors; `lines` are the batch and the heads of the mask."""
    batch, heads = batch_heads
    if features.OFFSET:  # tiles are aligned with the mask's rows, queries may start inside one
        tiles = triton.cdiv(sizes.q_len + config.block_m - 1, config.block_m)
    elif features.KIND == "sparse":
        tiles = _blocks(sizes.rows, features.BLOCK_Q) * (features.BLOCK_Q // config.block_m)
    else:
        tiles = triton.cdiv(sizes.q_len, config.block_m)
    streamed = sizes.kv_len * (features.DIM + features.DIM_V) * itemsize
    return fit(
        sizes,
        pairs=batch * heads,
        heads=heads,
        lines=lines,
        blocks=_blocks(sizes.rows, features.BLOCK_Q),
        tiles=tiles,
        section=_section(batch * heads, streamed / sizes.group),
    ), dataclasses.replace(
        features,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SLACK=configs.SLACK if config.lazy else 0,
    )


def over_keys(
    call: KernelArguments, mask: BlockMask, query: Tensor, config: configs.Config, *, atomic: bool
) -> tuple[LaunchSizes, Features]:
    """A call as seen by a kernel that holds a tile of keys and walks queries."""
    lines, itemsize = (mask.batch, mask.heads), query.element_size()
    return _over_keys(call.sizes, call.features, query.shape[:2], lines, itemsize, config, atomic)


@functools.lru_cache(REMEMBERED)
def _over_keys(
    sizes: LaunchSizes,
    features: Features,
    batch_heads: tuple[int, int],
    lines: tuple[int, int],
    itemsize: int,
    config: configs.Config,
    atomic: bool,
) -> tuple[LaunchSizes, Features]:
    """`over_keys` without tensors, as `_over_queries`."""
    grouped = sizes.group > 1 and not atomic
    batch, heads = batch_heads
    if grouped:
        heads //= sizes.group
    blocks = _blocks(sizes.kv_len, features.BLOCK_KV)
    if features.KIND == "sparse":
        tiles = blocks * (features.BLOCK_KV // config.block_n)
    else:
        tiles = triton.cdiv(sizes.kv_len, config.block_n)
    streamed = sizes.q_len * (features.DIM + features.DIM_V) * itemsize
    return fit(
        sizes,
        pairs=batch * heads,
        heads=heads,
        lines=lines,
        blocks=blocks,
        tiles=tiles,
        section=_section(batch * heads, streamed * (sizes.group if grouped else 1)),
    ), dataclasses.replace(
        features,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ATOMIC=atomic,
        GROUPED=grouped,
        SHARED_KV=sizes.group > 1 and atomic,
        BIAS_GRADIENT=features.BIAS != "none",
    )


def fit(
    sizes: LaunchSizes,
    *,
    pairs: int,
    heads: int,
    lines: tuple[int, int],
    blocks: int,
    tiles: int,
    section: int = 0,
) -> LaunchSizes:
    """Sizes of a launch over `pairs`, whose mask has `blocks` lines for each batch and head of
    `lines`.
    """
    mask_batch, mask_heads = lines
    return sizes._replace(
        pairs=pairs,
        heads=heads,
        line_batch=mask_heads * blocks if mask_batch > 1 else 0,
        line_head=blocks if mask_heads > 1 else 0,
        tiles=tiles,
        section=section,
    )


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _section(pairs: int, pair_bytes: float) -> int:
    return max(1, min(pairs, int(L2_BYTES / max(1.0, pair_bytes))))
