"""Reading prompts into a cache, and checks that every way of generating shares."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flashmark.arguments import check_count
from flashmark.models.layers import check_key_mask


class CachedModel(Protocol):
    """Interface of a model that can generate.

    `flashmark.models.Decoder`, `decoder.given(memory)` and `t5.given(source)` have it.
    """

    def init_cache(self, batch: int, max_length: int): ...

    def __call__(self, ids: Tensor, *, key_mask: Tensor | None = None, cache=None) -> Tensor: ...


class Ends:
    """End tokens, and what finished samples are filled with."""

    def __init__(self, end_token: int | Sequence[int] | None, padding_token: int | None):
        if end_token is None:
            ends: list[int] = []
        elif isinstance(end_token, numbers.Integral):
            ends = [int(end_token)]
        else:
            ends = [int(x) for x in end_token]
        self.tokens = ends
        self._tensor = torch.tensor(ends, dtype=torch.int64)
        self.filler = padding_token if padding_token is not None or not ends else ends[0]

    def __bool__(self) -> bool:
        return bool(self.tokens)

    def reached(self, token: Tensor) -> Tensor:
        """Bool, like `token`: whether it is an end token."""
        if self._tensor.device != token.device or self._tensor.dtype != token.dtype:
            self._tensor = self._tensor.to(token)  # once: it waits for a GPU
        return (token[..., None] == self._tensor).any(-1)


def aligned(ids: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts moved to the left, (B, longest), and their lengths (B,)."""
    if key_mask is None:
        return ids, torch.full(ids.shape[:1], ids.shape[1], device=ids.device)
    lengths = key_mask.sum(1)
    order = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)
    longest = int(lengths.max()) if len(lengths) else ids.shape[1]
    return ids.gather(1, order)[:, :longest], lengths


def read(model: CachedModel, prompts: Tensor, lengths: Tensor, chunk: int, cache) -> Tensor:
    """The logits (B, V) after each prompt's last token."""
    last: Tensor | None = None
    for start in range(0, prompts.shape[1], chunk):
        part = prompts[:, start : start + chunk]
        held = (lengths - start).clamp(0, part.shape[1])
        columns = torch.arange(part.shape[1], device=part.device)
        padded = bool((held < part.shape[1]).any())
        logits = model(part, key_mask=columns < held[:, None] if padded else None, cache=cache)
        ends = logits.gather(
            1, (held - 1).clamp_min(0)[:, None, None].expand(-1, 1, logits.shape[-1])
        )[:, 0]
        last = ends if last is None else torch.where((held > 0)[:, None], ends, last)
    return last


def check_prompts(input_ids, max_new_tokens, key_mask, chunk) -> tuple[int, int]:
    """Check the arguments; returns `max_new_tokens` and the tokens of a chunk."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected a tensor of shape (B, N), got {got}")
    if not input_ids.shape[1]:
        raise ValueError("input_ids: expected at least one token, got none")
    max_new_tokens = check_count("max_new_tokens", max_new_tokens, 0)
    chunk = input_ids.shape[1] if chunk is None else check_count("chunk", chunk)
    check_key_mask("key_mask", key_mask, input_ids)
    if key_mask is not None and not bool(key_mask.any(1).all()):
        raise ValueError("key_mask: expected at least one token in every prompt, got none in one")
    return max_new_tokens, chunk


def check_room(cache, batch: int, needed: int) -> None:
    if cache is None:
        return
    if cache.length.shape[0] != batch:
        raise ValueError(
            f"cache: expected a batch of {batch} like input_ids, got {cache.length.shape[0]}"
        )
    held = int(cache.length.max()) if batch else 0
    if held + needed > cache.max_length:
        raise ValueError(
            f"cache: expected room for {held + needed} tokens (held, prompt and new ones), "
            f"got max_length {cache.max_length}"
        )
