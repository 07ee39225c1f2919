"""`to_nystrom` and `to_hybrid`: landmark attention in models of transformers, in place."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from torch import nn

from flashmark.arguments import check_count
from flashmark.integrations.huggingface.attention import register
from flashmark.integrations.huggingface.converted import (
    FIELD,
    Conversion,
    attach,
    attention_modules,
    is_converted,
    refusal,
)
from flashmark.integrations.huggingface.pretrained import check_implementation, conversions, names


def to_nystrom(
    model: nn.Module, landmarks: int = 64, *, layers: Iterable[int] | None = None
) -> nn.Module:
    """Replace causal self-attention by causal Nyström attention, in place.

    Every chosen attention module keeps its projections and their names and gets a module
    `landmarks` with one parameter (Hkv, M, D), in the dtype that it computes in; PEFT saves it with
    `modules_to_save=["landmarks"]`. The model then runs with `attn_implementation="flashmark"` and
    no other. Its configuration records the conversion: `save_pretrained` keeps it, and after
    `register()` any `from_pretrained` gives the converted model back. In generation a cache of keys
    and values becomes the state of the attention, whose size does not depend on the length.

    Landmarks stand at no position, so rotary positions are not applied in converted layers: of the
    order of tokens they see only what comes before what. `to_hybrid` keeps them for near tokens.
    The approximation has no attention weights to drop: their dropout is not applied.

    Args:
        model: of transformers, with attention modules that call its AttentionInterface (those of
            Llama, Qwen, Mistral, GPT-2, GPT-NeoX and their relatives).
        landmarks: M, 1 to 256.
        layers: indices of the layers to convert, none of them converted before; None for all.

    Returns:
        the model.

    Raises:
        ValueError, TypeError: an argument out of range; no attention module that could be
            converted; one that is converted already.
        NotImplementedError: a sliding window, softcap, sinks or latent keys in a layer to convert;
            when it runs, another mask than causality and padding.
    """
    return _convert(model, "nystrom", landmarks, layers, None)


def to_hybrid(
    model: nn.Module,
    landmarks: int = 64,
    *,
    window: int = 256,
    layers: Iterable[int] | None = None,
) -> nn.Module:
    """Replace causal self-attention by `hybrid_attention` with merge="slots", in place.

    A token attends exactly to its chunk of `window` tokens and the one before, rotary positions and
    all, and to what lies before through landmarks: while a sequence has at most 2 * `window` tokens
    the model computes what it did. Landmarks see keys without their rotation (which enlarges keys
    and queries by the rotary part of a head: head_dim 128 at most where all of it is rotated), so
    that neither padding nor a shift of positions changes anything.

    All else, and what it raises, is as for `to_nystrom`. Tokens that padding hides are taken out
    before: how many there are is read from the device, once a forward.

    Args:
        model, landmarks, layers: as for `to_nystrom`.
        window: tokens of a chunk, >= 1.

    Returns:
        the model.
    """
    return _convert(model, "hybrid", landmarks, layers, check_count("window", window))


def _convert(
    model: Any, kind: str, landmarks: int, layers: Iterable[int] | None, window: int | None
) -> nn.Module:
    integral = isinstance(landmarks, numbers.Integral) and not isinstance(landmarks, bool)
    if not integral or not 1 <= landmarks <= 256:
        raise ValueError(f"landmarks: expected an int from 1 to 256, got {landmarks!r}")
    landmarks = int(landmarks)
    found = list(attention_modules(model))
    if not found or not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            "model: expected causal attention modules that call the AttentionInterface of "
            f"transformers, got none in {type(model).__name__}"
        )
    chosen = _chosen(layers, sorted({module.layer_idx for module in found}))
    found = [module for module in found if module.layer_idx in chosen]
    for module in found:
        recorded = any(module.layer_idx in each.layers for each in conversions(module.config))
        if is_converted(module):
            raise ValueError(
                f"layers: expected layers with attention of their own, got {module.layer_idx}, "
                "converted before"
            )
        if recorded:
            raise ValueError(
                f"model: expected landmarks in layer {module.layer_idx}, which its configuration "
                "records, got none: call register() before from_pretrained"
            )
        if reason := refusal(module, kind):
            fit = [x.layer_idx for x in attention_modules(model) if refusal(x, kind) is None]
            raise NotImplementedError(
                f"layers: expected {reason} in layer {module.layer_idx} (layers that can be "
                f"converted: {fit})"
            )
    register()
    if model.config._attn_implementation not in names:
        model.set_attn_implementation("flashmark")
    for module in found:
        check_implementation(module.config._attn_implementation)
    conversion = Conversion(kind, landmarks, chosen, window)
    for module in found:
        attach(model, module, conversion)
    record = {k: v for k, v in dataclasses.asdict(conversion).items() if v is not None}
    for config in {id(module.config): module.config for module in found}.values():
        setattr(config, FIELD, [*(getattr(config, FIELD, None) or []), record])
        config.attn_implementation = config._attn_implementation
    return model


def _chosen(layers: Iterable[int] | None, known: list[int]) -> list[int]:
    if layers is None:
        return known
    try:
        chosen = sorted({operator.index(layer) for layer in layers})
    except TypeError as error:
        raise TypeError(f"layers: expected indices of layers, got {layers!r}") from error
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"layers: expected some of {known}, got {chosen}")
    return chosen
