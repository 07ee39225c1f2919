"""Models of transformers whose configuration records a conversion are built converted."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flashmark.integrations.huggingface.converted import (
    FIELD,
    Conversion,
    LandmarkModule,
    attach,
    attention_modules,
    is_converted,
)
from flashmark.integrations.huggingface.state import tell_later_layers

names: list[str] = []  # names that `register` was called with


def check_implementation(name: str | None) -> None:
    if name not in names:
        raise ValueError(
            "attn_implementation: expected 'flashmark' for a model with landmark attention, "
            f"got {name!r}"
        )


def conversions(config: Any) -> list[Conversion]:
    """Conversions that a configuration records."""
    return [Conversion(**each) for each in getattr(config, FIELD, None) or []]


def extend_transformers() -> None:
    """Make `from_pretrained` and other ways to build a model read the recorded conversions."""
    if hasattr(PreTrainedModel.post_init, "__wrapped__"):
        return
    _extend("post_init", _post_init)
    _extend("_initialize_weights", _initialize_weights)
    _extend("_check_and_adjust_attn_implementation", _check_and_adjust_attn_implementation)
    tell_later_layers()


def _extend(name: str, extended: Any) -> None:
    original = getattr(PreTrainedModel, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return extended(original, self, *args, **kwargs)

    setattr(PreTrainedModel, name, method)


def _post_init(original: Any, model: Any) -> None:
    original(model)
    for conversion in conversions(model.config):
        model.config.attn_implementation = model.config._attn_implementation
        for module in attention_modules(model):
            recorded = module.config is model.config and module.layer_idx in conversion.layers
            if recorded and not is_converted(module):
                attach(model, module, conversion)


def _initialize_weights(original: Any, model: Any, module: nn.Module, *args: Any) -> None:
    """Initialise landmarks that a checkpoint does not hold."""
    if not isinstance(module, LandmarkModule):
        return original(model, module, *args)
    if not getattr(module.bias, "_is_hf_initialized", False):
        module.reset_parameters()


def _check_and_adjust_attn_implementation(
    original: Any, model: Any, attn_implementation: str | None, *args: Any, **kwargs: Any
) -> str:
    if conversions(model.config):
        attn_implementation = attn_implementation or names[0]
        check_implementation(attn_implementation)
    return original(model, attn_implementation, *args, **kwargs)
