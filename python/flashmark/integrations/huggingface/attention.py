"""`register`: the attention function and the mask function that transformers calls."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask
from transformers.utils import generic

from flashmark import masks
from flashmark.block_sparse import block_sparse_attention
from flashmark.integrations.huggingface.converted import Call, attend, is_converted
from flashmark.integrations.huggingface.masks import (
    LazyMask,
    Sizes,
    TracedMask,
    key_padding,
    translate,
)
from flashmark.integrations.huggingface.pretrained import extend_transformers, names
from flashmark.masks import BlockMask, Mask
from flashmark.masks.cache import compiled_tensor

__all__ = ["attention", "attention_mask", "register"]


def register(name: str = "flashmark") -> None:
    """Make `attn_implementation=name` known to transformers: the attention and its masks; and
    "flashmark_routed", as `register_routed` does.

    Both are needed: without a mask function transformers passes no mask, and models whose layers do
    not ask for causality themselves would see the future. transformers takes every name with
    "flash" in it for a kernel of FlashAttention; the name is exempted from that. Early releases of
    version 5 still apply it to some configurations (gpt-oss): there, choose a name without.
    From then on a model whose configuration records a conversion (`to_nystrom`, `to_hybrid`) is
    built and loaded as one; without it, transformers refuses to load one.
    """
    from flashmark.integrations.huggingface.routed import register_routed

    make_known(name, attention)
    if "flashmark_routed" not in names:
        register_routed()
    extend_transformers()


def make_known(name: str, function: Callable) -> None:
    """Register an attention function, and our masks with it."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, attention_mask)
    if name not in names:
        names.append(name)
    if generic.is_flash_attention_requested is not _is_flash_attention_requested:
        _replace(generic.is_flash_attention_requested, _is_flash_attention_requested)


_asked_of_transformers = generic.is_flash_attention_requested


@functools.wraps(_asked_of_transformers)
def _is_flash_attention_requested(
    config: Any = None,
    requested_attention_implementation: str | None = None,
    *version: Any,
    **options: Any,
) -> bool:
    name = requested_attention_implementation
    if config is not None and name is None:
        name = config._attn_implementation
    if isinstance(name, str) and name in names:
        return False
    return _asked_of_transformers(config, requested_attention_implementation, *version, **options)


def _replace(function: Callable, replacement: Callable) -> None:
    """In every module of transformers that has imported it; later ones find the replacement."""
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {})
        if held.get("__name__", "").startswith("transformers.") and (
            held.get(function.__name__) is function
        ):
            setattr(module, function.__name__, replacement)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | TracedMask | Mask | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    flashmark: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), heads not repeated.
        attention_mask: from `attention_mask` below; or (B | 1, H | 1, Nq | 1, Nk), bool or additive
            as users pass it; None asks `is_causal`, then `module.is_causal`.
        softcap, s_aux, position_bias: `softcap`, `sinks` and `bias` of block_sparse_attention.
        sliding_window: read only without an attention_mask, which else holds it.
        flashmark: from a module that was converted to landmark attention.

    Returns:
        (B, Nq, Hq, Dv) contiguous, and None for the weights, which are never formed.

    Raises:
        NotImplementedError: `output_attentions`, or the paged cache of continuous batching.
    """
    refuse(kwargs)
    if is_converted(module):
        out = attend(
            module, query, key, value, attention_mask, scaling, flashmark, softcap=softcap,
            s_aux=s_aux, position_bias=position_bias, sliding_window=sliding_window,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask, offset, bias = _without_mask(causal, sliding_window), None, position_bias
    else:
        mask, offset, bias = _read(attention_mask, query, key, position_bias)
    out = block_sparse_attention(
        query, key, value, mask, query_offset=offset, bias=bias, scale=scaling, softcap=softcap,
        sinks=s_aux, dropout_p=dropout,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def refuse(options: dict[str, Any]) -> None:
    """Raise for what no implementation of flashmark can do."""
    if options.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions: expected False with flashmark, which forms no attention weights"
        )
    if options.get("cache") is not None:
        raise NotImplementedError("cache: expected no paged cache with flashmark, got one")


def _without_mask(causal: bool, sliding_window: int | None) -> Mask | None:
    if not causal:
        return None
    mask = masks.causal()
    return mask if sliding_window is None else mask & masks.sliding_window(sliding_window)


def _read(
    given: Any, query: Tensor, key: Tensor, bias: Tensor | None
) -> tuple[Mask | BlockMask | None, int | Tensor | None, Tensor | None]:
    """(mask, query_offset, bias) for block_sparse_attention."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(given, Mask | BlockMask):
        return given, None, bias
    if isinstance(given, TracedMask):
        if given.padding is not None:
            bias = _added(bias, given.padding[:, None, None])
        return masks.causal() if given.is_causal else None, given.query_offset, bias
    if isinstance(given, LazyMask) and given.shape[2:] == (q_len, kv_len):
        if q_len > 1 or given.padding is None:
            return given.for_kernels(), given.query_offset, bias
        given = given.dense()
    given = given[..., :kv_len]  # masks for the whole of a static cache
    if given.dtype == torch.bool and q_len > 1 and not torch.compiler.is_compiling():
        return compiled_tensor(given), None, bias
    return None, None, _added(bias, given)


def _added(bias: Tensor | None, mask: Tensor) -> Tensor:
    """A bias that hides what the mask hides: False, or numbers too low to be meant as a bias."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), device=mask.device) if bias is None else bias
        return torch.where(mask, zero, -torch.inf)
    mask = mask.masked_fill(mask <= 0.5 * torch.finfo(mask.dtype).min, -torch.inf)
    return mask if bias is None else bias + mask


def attention_mask(**given: Any) -> Tensor | TracedMask | None:
    """The mask function that transformers calls, with what `eager_mask` takes.

    Returns a `LazyMask` (B, 1, Nq, Nk) holding an expression; elements where there is one query and
    a static cache (a compiled step takes tensors only), where users gave functions of their own
    that need `vmap`, and inside torch.compile for patterns beyond causality and padding.
    """
    sizes = _sizes(given)
    function = given.get("mask_function", causal_mask_function)
    padding = given.get("attention_mask")
    if torch.compiler.is_compiling():
        if function is causal_mask_function or function is bidirectional_mask_function:
            return _traced(function is causal_mask_function, padding, sizes)
        return _elements(given)
    one_compiled_step = sizes.q_len == 1 and not given.get("allow_is_causal_skip", True)
    if one_compiled_step or given.get("use_vmap", False):
        return _elements(given)
    pattern = translate(function, sizes)
    padding = key_padding(padding, sizes, causal=function is not bidirectional_mask_function)
    if padding is not None and bool(padding.all()):
        padding = None
    shape = given["batch_size"], sizes.q_len, sizes.kv_len
    offset = None if pattern is None or sizes.aligned else sizes.query_offset
    dtype, device = given.get("dtype", torch.float32), given.get("device", "cpu")
    return LazyMask(pattern, padding, shape, offset, dtype=dtype, device=device)


def _elements(given: dict[str, Any]) -> Tensor | None:
    return eager_mask(**given | {"allow_is_bidirectional_skip": False})


def _traced(is_causal: bool, padding: Tensor | None, sizes: Sizes) -> TracedMask:
    offset = None
    if is_causal and not sizes.aligned:
        offset = sizes.query_offset
    return TracedMask(is_causal, key_padding(padding, sizes, is_causal), offset)


def _sizes(given: dict[str, Any]) -> Sizes:
    """Early releases of transformers 5 pass `cache_position` instead of a length and an offset."""
    positions = given.get("cache_position")
    q_offset = given.get("q_offset", 0)
    if positions is not None:
        q_len, q_offset = positions.shape[0], positions[0]
        if not torch.compiler.is_compiling():
            q_offset = int(q_offset)
    else:
        q_len = given["q_length"]
    return Sizes(q_len, given["kv_length"], q_offset, given.get("kv_offset", 0))
