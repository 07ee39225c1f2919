"""Sampling from a model with a cache, and predicting many places at once without one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flashmark.arguments import finite
from flashmark.models.layers import check_key_mask


class CachedModel(Protocol):
    """What `generate` needs: `flashmark.models.Decoder`, or `T5.given(source)`."""

    def init_cache(self, batch: int, max_length: int): ...

    def __call__(self, ids: Tensor, *, key_mask: Tensor | None = None, cache=None) -> Tensor: ...


@torch.no_grad()
def generate(
    model: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    key_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = None,
    padding_token: int | None = None,
    chunk: int | None = None,
    cache=None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each prompt by up to `max_new_tokens` tokens, each token computed once.

    Args:
        model: with `init_cache(batch, max_length)` and `model(ids, key_mask=, cache=)` -> logits.
            Put it into eval mode yourself.
        input_ids: (B, N) prompts, padded on the left or on the right.
        max_new_tokens: at most this many; fewer when all samples have reached `end_token`.
        key_mask: bool (B, N), False where a prompt is padded; at least one True a row.
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and sampled.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability.
        end_token: a sample that has produced it is finished.
        padding_token: what finished samples are filled with; `end_token` when None.
        chunk: read prompts in pieces of so many tokens, for less memory at a time.
        cache: what the model has read before these prompts, updated in place; a new one that holds
            exactly prompt and continuation when None.
        generator: of the random choices.

    Returns:
        (B, T) new tokens, T <= max_new_tokens, without the prompts.

    Raises:
        ValueError, TypeError: an argument out of range, or a cache too small for the tokens.

    A sample of a batch gets the tokens that it gets alone, whatever the padding.
    """
    _check(input_ids, max_new_tokens, key_mask, chunk)
    choose = _Choice(temperature, top_k, top_p, generator)
    prompts, lengths = _aligned(input_ids, key_mask)
    batch, longest = prompts.shape
    needed = longest + max(max_new_tokens - 1, 0)  # the last token is never read
    _check_room(cache, batch, needed)
    if cache is None:
        cache = model.init_cache(batch, needed)

    logits = _read(model, prompts, lengths, chunk or longest, cache)
    filler = end_token if padding_token is None else padding_token
    finished = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    tokens: list[Tensor] = []
    while len(tokens) < max_new_tokens:
        token = choose(logits).to(prompts.dtype)
        if end_token is not None:
            token = token.masked_fill(finished, filler)
            finished |= token == end_token
        tokens.append(token)
        if len(tokens) == max_new_tokens or (end_token is not None and bool(finished.all())):
            break
        logits = model(token[:, None], cache=cache)[:, -1]
    return torch.stack(tokens, dim=1) if tokens else prompts[:, :0]


@torch.no_grad()
def predict_in_parallel(model: CachedModel, prefix: Tensor, places: Tensor) -> Tensor:
    """Logits (B, K, V) for each of `places` (B, K) after `prefix` (B, P), all in one call.

    Places hold tokens: candidates whose continuation is asked for, or a placeholder for what is to
    stand there. The model is one trained with `masks.pinned(P)`, where each place sees the prefix
    and itself: what it says of one does not depend on what else is asked for in the same call.
    """
    if prefix.shape[:1] != places.shape[:1]:
        raise ValueError(
            f"places: expected a batch of {prefix.shape[0]} like prefix, got {places.shape[0]}"
        )
    return model(torch.cat([prefix, places], dim=1))[:, prefix.shape[1] :]


class _Choice:
    """The next token of each sample from its logits (B, V)."""

    def __init__(self, temperature, top_k, top_p, generator):
        self.temperature = finite("temperature", temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected an int >= 1, got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
        self.top_k, self.top_p, self.generator = top_k, top_p, generator

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0.0:
            return logits.argmax(-1)
        logits, order = (logits.float() / self.temperature).sort(
            stable=True, dim=-1, descending=True
        )
        if self.top_k is not None:
            logits[:, self.top_k :] = -torch.inf
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities  # of all that are likelier
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)
        return order.gather(1, drawn)[:, 0]


def _aligned(ids: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts moved to the left, (B, longest), and their lengths (B,)."""
    if key_mask is None:
        return ids, torch.full(ids.shape[:1], ids.shape[1], device=ids.device)
    lengths = key_mask.sum(1)
    order = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)
    longest = int(lengths.max()) if len(lengths) else ids.shape[1]
    return ids.gather(1, order)[:, :longest], lengths


def _read(model: CachedModel, prompts: Tensor, lengths: Tensor, chunk: int, cache) -> Tensor:
    """The logits (B, V) after each prompt's last token."""
    last: Tensor | None = None
    for start in range(0, prompts.shape[1], chunk):
        piece = prompts[:, start : start + chunk]
        held = (lengths - start).clamp(0, piece.shape[1])
        columns = torch.arange(piece.shape[1], device=piece.device)
        padded = bool((held < piece.shape[1]).any())
        logits = model(piece, key_mask=columns < held[:, None] if padded else None, cache=cache)
        ends = logits.gather(
            1, (held - 1).clamp_min(0)[:, None, None].expand(-1, 1, logits.shape[-1])
        )[:, 0]
        last = ends if last is None else torch.where((held > 0)[:, None], ends, last)
    return last


def _check(input_ids, max_new_tokens, key_mask, chunk) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected a tensor of shape (B, N), got {got}")
    if not input_ids.shape[1]:
        raise ValueError("input_ids: expected at least one token, got none")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an int >= 0, got {max_new_tokens}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected an int >= 1 or None, got {chunk}")
    check_key_mask("key_mask", key_mask, input_ids)
    if key_mask is not None and not bool(key_mask.any(1).all()):
        raise ValueError("key_mask: expected at least one token in every prompt, got none in one")


def _check_room(cache, batch: int, needed: int) -> None:
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
