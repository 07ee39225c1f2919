"""From the mask functions of transformers to flashmark's expressions."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from flashmark import masks
from flashmark.masks import BlockMask, Mask
from flashmark.masks.cache import compiled

_aten = torch.ops.aten


class LazyMask(Tensor):
    """An additive mask (B, 1, Nq, Nk) that holds its formula instead of its elements.

    transformers hands masks from the model to its layers as tensors. Our attention reads the
    formula; any other operation gets the elements that eager attention would: 0, or the lowest
    number of the dtype where a key is hidden. So models with their own attention, which ask for
    no implementation, stay correct.
    """

    pattern: Mask | None
    padding: Tensor | None
    query_offset: int | Tensor | None
    expression: Mask | None

    @staticmethod
    def __new__(
        cls,
        pattern: Mask | None,
        padding: Tensor | None,
        shape: tuple[int, int, int],
        query_offset: int | Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyMask:
        """`shape` is (B, Nq, Nk); `padding` bool (B, Nk). With `query_offset` the pattern is one
        of (Nk, Nk)."""
        batch, q_len, kv_len = shape
        self = Tensor._make_wrapper_subclass(
            cls, (batch, 1, q_len, kv_len), dtype=dtype, device=device
        )
        self.pattern, self.padding, self.query_offset = pattern, padding, query_offset
        self.expression = pattern if padding is None else both(pattern, masks.key_padding(padding))
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0].copy()
        with enable_reentrant_dispatch():  # functions of users run under vmap
            args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # type: ignore[override]
        return f"LazyMask({self.expression}, {tuple(self.shape)}, offset={self.query_offset})"

    def copy(self) -> LazyMask:
        shape = self.shape[0], *self.shape[2:]
        return LazyMask(
            self.pattern, self.padding, shape, self.query_offset, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip

    def kept(self, tokens: int) -> Tensor | None:
        """Key mask of the last `tokens` keys, bool (B, tokens), True: takes part; None: all do.

        Found once for the layers of a forward, since telling "all" waits for the device.
        """
        if self.padding is None:
            return None
        if getattr(self, "_kept", (None,))[0] != tokens:
            if self.query_offset is None:
                kept = self.padding[:, self.padding.shape[1] - tokens :]
            else:
                place = torch.arange(tokens, device=self.device) + self.query_offset
                kept = self.padding[:, place]
            self._kept = tokens, None if bool(kept.all()) else kept
        return self._kept[1]

    def for_kernels(self) -> Mask | BlockMask | None:
        """The expression; one that reads tensors compiled, once for the layers of a forward."""
        mask = self.expression
        if mask is None or mask.formula is not None or torch.compiler.is_compiling():
            return mask
        if not hasattr(self, "_compiled"):
            batch, _, q_len, kv_len = self.shape
            rows = q_len if self.query_offset is None else kv_len
            self._compiled = compiled(mask, batch, 1, rows, kv_len, self.device)
        return self._compiled

    def dense(self) -> Tensor:
        """Every element, computed once."""
        if not hasattr(self, "_dense"):
            self._dense = self._written_out()
        return self._dense

    def _written_out(self) -> Tensor:
        batch, _, q_len, kv_len = self.shape
        zeros = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if self.expression is None:
            return zeros
        rows = q_len if self.query_offset is None else kv_len
        visible = self.expression.to_dense(batch, 1, rows, kv_len, device=self.device)
        if self.query_offset is not None:
            place = torch.arange(q_len, device=self.device) + self.query_offset
            visible = visible[:, :, place]
        return zeros.masked_fill(~visible, torch.finfo(self.dtype).min)


@dataclasses.dataclass
class TracedMask:
    """Mask inside torch.compile, where only causality and padding stay a formula."""

    is_causal: bool
    padding: Tensor | None  # bool (B, Nk)
    query_offset: int | Tensor | None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Positions of queries and keys in the stream of tokens."""

    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int

    @property
    def aligned(self) -> bool:
        """Whether the last query is the last key: flashmark's own alignment."""
        offset = self.q_offset
        return isinstance(offset, int) and offset - self.kv_offset == self.kv_len - self.q_len

    @property
    def query_offset(self) -> int | Tensor:
        """Position of query 0 among the keys. A static cache counts in place, so it is copied."""
        return self.q_offset - self.kv_offset if self.kv_offset else self.q_offset + 0


@functools.lru_cache(maxsize=64)
def _window(left: int, right: int | None) -> Mask:
    return masks.sliding_window(left, right)


@functools.cache
def _causal() -> Mask:
    return masks.causal()


def is_plain_causal(mask: LazyMask) -> bool:
    """Whether a query sees all keys up to its own, but for padding."""
    return mask.pattern is _causal()


@functools.lru_cache(maxsize=64)
def _known_both(left: Mask, right: Mask) -> Mask:
    return left & right


def both(left: Mask | None, right: Mask | None) -> Mask | None:
    """`&`, with None for "everything". The same position-only pair is the same object: what was
    compiled for it is found again at the next call."""
    if left is None or right is None:
        return right if left is None else left
    positions_only = left.closed_form and right.closed_form
    if positions_only and not left.tensors() and not right.tensors():
        return _known_both(left, right)
    return left & right


def translate(function: Callable, sizes: Sizes) -> Mask | None:
    """The expression of a mask function of `transformers.masking_utils`; None sees everything.

    Its own building blocks are known by name and come out in closed form; any other function of
    indices becomes a `mask_mod`.
    """
    name = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner_mask")
    held = _closure(function)
    match name:
        case "bidirectional_mask_function":
            return None
        case "causal_mask_function":
            return _causal()
        case "sliding_window_overlay" if isinstance(held["sliding_window"], int):
            return _window(held["sliding_window"], None)
        case "sliding_window_bidirectional_overlay" if isinstance(held["sliding_window"], int):
            return _window(held["sliding_window"] + 1, held["sliding_window"])
        case "packed_sequence_mask_function":
            return masks.documents(_of_keys(held["packed_sequence_mask"], sizes))
        case "chunked_overlay" if sizes.aligned or not isinstance(sizes.q_offset, int):
            padding = held["left_padding"]
            position = torch.arange(sizes.kv_len, device=padding.device) + sizes.kv_offset
            return masks.documents((position - padding[:, None]) // held["chunk_size"])
        case "and_masks.<locals>.and_mask":
            parts = _without_remapping(held["mask_functions"])
            return functools.reduce(both, (translate(part, sizes) for part in parts))
        case "or_masks.<locals>.or_mask":
            parts = [translate(part, sizes) for part in held["mask_functions"]]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            return functools.reduce(operator.or_, known)
    return _opaque(function, sizes)


def _closure(function: Callable) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _without_remapping(parts: tuple[Callable, ...]) -> tuple[Callable, ...]:
    """Positions inside a packed sequence differ from those in the row by a constant of the
    sequence, which a function of their difference does not see."""
    if len(parts) != 2 or "packed_sequence_mask_function" not in parts[0].__qualname__:
        return parts
    held = _closure(parts[1])
    if "mask_function" in held and _of_differences(held["mask_function"]):
        return parts[0], held["mask_function"]
    return parts


def _of_differences(function: Callable) -> bool:
    name = getattr(function, "__qualname__", "")
    if name == "and_masks.<locals>.and_mask":
        return all(map(_of_differences, _closure(function)["mask_functions"]))
    return name.startswith(("causal_mask_function", "sliding_window", "bidirectional_mask"))


def _of_keys(ids: Tensor, sizes: Sizes) -> Tensor:
    return ids[:, sizes.kv_offset : sizes.kv_offset + sizes.kv_len]


def _opaque(function: Callable, sizes: Sizes) -> Mask:
    q_offset = sizes.q_offset if sizes.aligned else sizes.kv_offset
    if not isinstance(q_offset, int) or (q_offset == 0 and sizes.kv_offset == 0):
        return masks.mask_mod(function)
    return masks.mask_mod(lambda b, h, q, kv: function(b, h, q + q_offset, kv + sizes.kv_offset))


def key_padding(attention_mask: Tensor | None, sizes: Sizes, causal: bool) -> Tensor | None:
    """The 2-d mask of transformers cut to the keys at hand, bool (B, Nk).

    Keys behind its end are those that a static cache will hold later: a causal mask hides them.
    """
    if attention_mask is None:
        return None
    padding = attention_mask.bool()
    missing = sizes.kv_offset + sizes.kv_len - padding.shape[1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing), value=causal)
    return _of_keys(padding, sizes)
