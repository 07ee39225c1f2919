"""Causal Nyström attention in models of transformers: landmarks as parameters, state as cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from flashmark.integrations.huggingface.masks import LazyMask, TracedMask
from flashmark.masks.positions import is_plain_causal
from flashmark.nystrom import NystromState, nystrom_attention
from flashmark.nystrom.landmark_core import init_landmarks, mark_landmarks


class StateLayer(DynamicLayer):
    """A cache layer that holds the state of Nyström attention instead of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.state: NystromState | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new tokens only, the key labelled with this layer for the attention to find."""
        self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        key_states = key_states.view_as(key_states)
        key_states._flashmark_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length, self.state = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "crop: expected a cache of keys and values, got the state of Nyström attention, "
                "which forgets no single token"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda x: x.to(self.device, non_blocking=True))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = NystromState(*map(function, self.state))


def to_nystrom(
    model: nn.Module, landmarks: int = 64, *, layers: Iterable[int] | None = None
) -> nn.Module:
    """Replace causal self-attention by causal Nyström attention, in place.

    Every chosen attention module gets a parameter `landmarks` (Hkv, M, D) of its own dtype and
    keeps its projections and their names; the model then runs with
    `attn_implementation="flashmark"`. In generation a cache of keys and values becomes the state of
    the attention, whose size does not depend on the length. To load a checkpoint of a converted
    model, convert first and load the state dict then. The approximation has no attention weights
    to drop: their dropout is not applied.

    Args:
        model: of transformers, with attention modules that call its AttentionInterface (those of
            Llama, GPT-2 and their relatives).
        landmarks: M, 1 to 256.
        layers: indices of the layers to convert; None for all.

    Returns:
        the model.

    Raises:
        ValueError: no layer to convert.
        NotImplementedError: when it runs, softcap, sinks, relative bias, or another mask than
            causality and padding.
    """
    from flashmark.integrations.huggingface import register

    chosen = None if layers is None else set(layers)
    converted = 0
    module: Any
    for module in model.modules():
        if not _is_causal_attention(module) or (
            chosen is not None and module.layer_idx not in chosen
        ):
            continue
        projection = next(module.parameters())
        heads = getattr(module.config, "num_key_value_heads", module.config.num_attention_heads)
        initial = init_landmarks(
            heads, landmarks, module.head_dim, dtype=projection.dtype, device=projection.device
        )
        module.landmarks = mark_landmarks(nn.Parameter(initial))
        module.register_forward_pre_hook(_install_state, with_kwargs=True)
        converted += 1
    if converted == 0:
        raise ValueError(
            f"model: expected causal attention modules of transformers, got none in "
            f"{type(model).__name__}" + (f", layers {sorted(chosen)}" if chosen else "")
        )
    register()
    model.set_attn_implementation("flashmark")  # type: ignore[operator]
    return model


def _is_causal_attention(module: Any) -> bool:
    needed = ("config", "layer_idx", "head_dim", "is_causal")
    return all(hasattr(module, name) for name in needed) and module.is_causal is True


def _install_state(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))  # since 5.24, and before
    if cache is None:
        cache = next((x for x in args if isinstance(x, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return
    held, index = cache.layers, module.layer_idx
    while len(held) <= index:
        held.append(cache.layer_class_to_replicate())
    if isinstance(held[index], StateLayer):
        return
    if int(held[index].get_seq_length()):
        raise ValueError(
            "past_key_values: expected an empty cache or one of this model, got keys in layer "
            f"{index}"
        )
    held[index] = StateLayer()


def nystrom(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scale: float | None,
    **unsupported: Tensor | float | None,
) -> Tensor:
    """What `attention` computes for a converted module."""
    for name, given in unsupported.items():
        if given is not None:
            raise NotImplementedError(f"{name}: expected None with Nyström attention, got one")
    layer = getattr(key, "_flashmark_layer", None)
    padding = _padding(attention_mask, key.shape[2])
    if layer is None:
        return nystrom_attention(query, key, value, module.landmarks, scale=scale, key_mask=padding)
    out, layer.state = nystrom_attention(
        query, key, value, module.landmarks, scale=scale, key_mask=padding, state=layer.state,
        return_state=True,
    )  # fmt: skip
    return out


def _padding(mask: object, tokens: int) -> Tensor | None:
    """Which of the last tokens take part."""
    if mask is None or (isinstance(mask, TracedMask) and mask.is_causal):
        return None if mask is None or mask.padding is None else mask.padding[:, -tokens:]
    if not isinstance(mask, LazyMask) or mask.pattern is None or not is_plain_causal(mask.pattern):
        raise NotImplementedError(
            "attention_mask: expected causality and 2-d padding with Nyström attention, got "
            f"{mask!r}"
        )
    if mask.padding is None:
        return None
    if mask.query_offset is None:
        return mask.padding[:, -tokens:]
    return mask.padding[:, torch.arange(tokens, device=mask.device) + mask.query_offset]
