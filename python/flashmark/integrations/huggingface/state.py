"""The cache layer of a converted attention module: a state instead of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache


class Tokens(NamedTuple):
    """Consumed tokens, kept so that some of them can be taken back."""

    key: Tensor  # (B, Hkv, N, D)
    value: Tensor  # (B, Hkv, N, Dv)
    keep: Tensor | None  # bool (B, N): which of them take part


class StateLayer(DynamicLayer):
    """A cache layer that holds the state of Nyström or hybrid attention.

    The core of the landmarks that a stream began with is held too. A state forgets no single token:
    `crop` works after `activate_past_recording`: from then on the tokens since the last `crop` are
    kept as well. Cropping costs a pass over those that stay, at the next call.
    """

    def __init__(self, record_past: bool = False) -> None:
        super().__init__()
        self.record_past = record_past
        self.reset()

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.record_past

    def reset(self) -> None:
        self.length = 0
        self.state: Any = None
        self.core: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._before: Any = None  # the state before the recorded tokens
        self._recorded: list[Tokens] = []
        self._cropped = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new tokens only."""
        self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def consume(self, tokens: Tokens, attend: Callable[..., tuple[Tensor, Any]]) -> Tensor:
        """Output of `attend(tokens, state, True)`, which returns the state after them as well."""
        if self._cropped:
            state = self._before
            for kept in self._recorded:
                state = attend(kept, state, True)[1]
            self._forget()
            self.state = state
        if self.record_past:
            if not self._recorded:
                self._before = self.state
            self._recorded.append(tokens)
        out, self.state = attend(tokens, self.state, True)
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a number <= 0; older ones stay for good."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a number <= 0, got {tokens_to_remove}")
        if not self.record_past:
            if tokens_to_remove:
                raise NotImplementedError(
                    "crop: expected a cache that records its past (activate_past_recording), got a "
                    "state of landmark attention, which forgets no single token"
                )
            return
        if tokens_to_remove == 0:
            if not self._cropped:
                self._forget()
            return
        recorded = sum(tokens.key.shape[2] for tokens in self._recorded)
        if -tokens_to_remove > recorded:
            raise ValueError(
                f"crop: expected at most the {recorded} tokens recorded since the last crop, "
                f"got {-tokens_to_remove}"
            )
        self.length += tokens_to_remove
        self._cropped, left = True, recorded + tokens_to_remove
        kept = []
        for key, value, keep in self._recorded:
            if left > 0:
                part = None if keep is None else keep[:, :left]
                kept.append(Tokens(key[:, :, :left], value[:, :, :left], part))
            left -= key.shape[2]
        self._recorded = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change(lambda x: x.to(self.device, non_blocking=True))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        held = self.state, self._before, self._recorded
        self.state, self._before, self._recorded = tree_map_only(Tensor, function, held)


def state_layer(cache: Any, index: int) -> StateLayer | None:
    """The layer `index` of a cache, made one of states if it is still empty."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return None
    layers: Any = cache.layers
    while len(layers) <= index:
        layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    held: Any = layers[index]
    if not isinstance(held, StateLayer):
        if int(held.get_seq_length()):
            raise ValueError(
                "past_key_values: expected an empty cache or one of this model, got keys in layer "
                f"{index}"
            )
        records = getattr(held, "record_past", False) or getattr(cache, "_flashmark_records", False)
        held = layers[index] = StateLayer(records)
    return held


def tell_later_layers() -> None:
    """Caches remember that they record their past, for layers that become states only when used."""
    activate = getattr(Cache, "activate_past_recording", None)
    if activate is None or hasattr(activate, "__wrapped__"):
        return

    @functools.wraps(activate)
    def activate_past_recording(self: Any) -> None:
        self._flashmark_records = True
        activate(self)

    Cache.activate_past_recording = activate_past_recording  # type: ignore[method-assign]
