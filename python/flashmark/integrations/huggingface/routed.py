"""`register_routed`: causal layers of a model read the key blocks that each token chooses."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from flashmark.integrations.huggingface.attention import attention, make_known, refuse
from flashmark.integrations.huggingface.converted import is_converted
from flashmark.integrations.huggingface.masks import LazyMask, TracedMask, is_plain_causal
from flashmark.routed import routed_attention

__all__ = ["register_routed"]


def register_routed(
    name: str = "flashmark_routed", *, block_size: int = 64, top_k: int = 16, near: int = 1
) -> None:
    """Make `attn_implementation=name` known to transformers: `flashmark.routed_attention` with the
    mean key of each block, which needs no weights, so that a trained model can use it as it is.

    Layers of plain causal attention, with or without padding, are routed. All others (sliding
    windows, chunks, packed sequences, encoders, cross-attention, landmark attention) compute what
    they do with "flashmark". Blocks count the columns of a batch, padding included. A step with a
    cache summarises all keys again: it saves the reading of values only.

    Args:
        name: several may be registered, with different options; one again replaces its options.
        block_size, top_k, near: as in `flashmark.routed_attention`.

    The attention raises NotImplementedError for dropout, relative biases, and masks given as
    tensors, which those of static caches are while decoding.
    """
    options = {"block_size": block_size, "top_k": top_k, "near": near}
    make_known(name, functools.partial(_attention, options))


class _Causal(NamedTuple):
    """Causal attention of a call, and which keys take part."""

    padding: Tensor | None  # bool (B, Nk)
    query_offset: int | Tensor | None


def _attention(
    routing: dict[str, Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; arguments as of `attention`."""
    refuse(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = None
    if not is_converted(module):
        plain = _plain(attention_mask, query, key, bool(causal), sliding_window)
    if plain is None:
        return attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap, s_aux,
            position_bias, sliding_window, **kwargs,
        )  # fmt: skip
    if dropout:
        raise NotImplementedError(f"dropout: expected 0 with routed attention, got {dropout}")
    if position_bias is not None:
        raise NotImplementedError("position_bias: expected None with routed attention, got one")
    out: Any = routed_attention(
        query, key, value, **routing, scale=scaling, softcap=softcap, sinks=s_aux,
        key_mask=plain.padding, query_offset=plain.query_offset,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _plain(
    given: Any, query: Tensor, key: Tensor, causal: bool, sliding_window: int | None
) -> _Causal | None:
    """Causality and padding alone; None for any other pattern."""
    if given is None:
        return _Causal(None, None) if causal and sliding_window is None else None
    if isinstance(given, TracedMask):
        return _Causal(given.padding, given.query_offset) if given.is_causal else None
    if isinstance(given, LazyMask) and given.shape[2:] == (query.shape[2], key.shape[2]):
        if not is_plain_causal(given):
            return None
        return _Causal(given.padding, given.query_offset)
    if isinstance(given, Tensor):
        raise NotImplementedError(
            "attention_mask: expected causality and padding of a dynamic cache with routed "
            f"attention, got a tensor of shape {tuple(given.shape)}"
        )
    return None
