"""Compiled masks of calls: cached where sizes decide everything, else evaluated at each call.

A mask made of positions depends only on its expression and the sizes: these are the cache's key. A
tensor can change while its version, address and identity stay the same, and a function can read
anything, so masks that use either are never cached. To keep one, compile a BlockMask.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from flashmark.masks.block_mask import BlockMask, pack_mask, plain_mask, unpack_mask
from flashmark.masks.compile import compile_mask
from flashmark.masks.data import dense
from flashmark.masks.expression import Mask, from_formula
from flashmark.masks.positions import plain_kind
from flashmark.tracing import constant_when_traced, fake_mode, without_modes

REMEMBERED = 128  # compiled expressions of positions; each has O(tiles along its border) bytes


def block_mask_for(
    mask: Mask | BlockMask | None,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
) -> BlockMask:
    """The mask that kernels read. Causal and dense ones come without lists."""
    if isinstance(mask, BlockMask):
        return mask if torch.compiler.is_compiling() else _for_training(mask)
    kind = "dense" if mask is None else plain_kind(mask)
    if kind is not None:
        return (plain_mask if torch.compiler.is_compiling() else _plain)(kind, q_len, kv_len)
    assert mask is not None
    return compiled(mask, batch, heads, q_len, kv_len, device)


def _for_training(mask: BlockMask) -> BlockMask:
    """Tensors made in inference mode, as by a tree_map there, cannot be saved for a backward."""
    inference = mask.kind == "sparse" and mask.tile_bits.is_inference()
    if not inference or torch.is_inference_mode_enabled():
        return mask
    return mask.mapped(Tensor.clone)


_plain = functools.lru_cache(plain_mask)


def compiled(
    mask: Mask, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device
) -> BlockMask:
    """`compile_mask` at the largest block size of the expression."""
    # torch.compile may trace sizes as symbols: an expression is compiled for their values. One of
    # positions is the same for all samples and heads, whose numbers may stay free.
    q_len, kv_len = operator.index(q_len), operator.index(kv_len)
    if mask.formula is not None:
        if torch.compiler.is_compiling():
            return unpack_mask(*_constant(_fixed(mask.formula), q_len, kv_len, device))
        held = _remembered(mask.formula, q_len, kv_len, device)
        mode = fake_mode()
        return held if mode is None else held.mapped(mode.from_tensor)
    sizes = (operator.index(batch), operator.index(heads), q_len, kv_len)
    if torch.compiler.is_compiling():
        from flashmark.masks.untraced import evaluated

        return evaluated(mask, sizes, device)
    return compile_mask(mask, *sizes, device=device, block_size=mask.block_size())


@functools.lru_cache(maxsize=REMEMBERED)
def _remembered(
    formula: tuple[Any, ...], q_len: int, kv_len: int, device: torch.device
) -> BlockMask:
    mask = from_formula(formula)
    with without_modes():
        return compile_mask(mask, 1, 1, q_len, kv_len, device=device, block_size=mask.block_size())


def _fixed(formula: tuple[Any, ...]) -> tuple[Any, ...]:
    """A formula with the values of integers that torch.compile traces as symbols."""
    return tuple(
        _fixed(x) if isinstance(x, tuple) else operator.index(x) if isinstance(x, int) else x
        for x in formula
    )


@constant_when_traced
def _constant(
    formula: tuple[Any, ...], q_len: int, kv_len: int, device: torch.device
) -> tuple[list[Tensor], list[int], str]:
    return pack_mask(_remembered(formula, q_len, kv_len, device))


def compiled_tensor(visible: Tensor) -> BlockMask:
    """The BlockMask of a bool tensor (..., Nq, Nk) of 2 to 4 dimensions, as it is now."""
    sizes = (1,) * (4 - visible.dim()) + tuple(visible.shape)
    return compile_mask(dense(visible), *sizes, device=visible.device)
