"""One token after the other from a model with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashmark.generation.choice import Choice
from flashmark.generation.prompts import (
    CachedModel,
    Ends,
    aligned,
    check_prompts,
    check_room,
    read,
)


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
    end_token: int | Sequence[int] | None = None,
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
        max_new_tokens: at most this many; fewer when all samples have reached an end token.
        key_mask: bool (B, N), False where a prompt is padded; at least one True a row.
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and sampled.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability.
        end_token: a sample that has produced it, or one of several, is finished.
        padding_token: what finished samples are filled with; the first end token when None.
        chunk: read prompts this many tokens at a time, for less memory.
        cache: what the model has read before these prompts, updated in place; a new one that holds
            exactly prompt and continuation when None.
        generator: of the random choices.

    Returns:
        (B, T) new tokens, T <= max_new_tokens, without the prompts.

    Raises:
        ValueError, TypeError: an argument out of range, or a cache too small for the tokens.

    A sample of a batch gets the tokens that it gets alone, whatever the padding. Afterwards `cache`
    holds each sample's prompt and new tokens but the last (the end token, if it has one): the next
    turn of a conversation begins with that token.
    """
    tokens = list(
        stream(
            model, input_ids, max_new_tokens, key_mask=key_mask, temperature=temperature,
            top_k=top_k, top_p=top_p, end_token=end_token, padding_token=padding_token,
            chunk=chunk, cache=cache, generator=generator,
        )
    )  # fmt: skip
    return torch.stack(tokens, dim=1) if tokens else input_ids[:, :0]


def stream(
    model: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    key_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | Sequence[int] | None = None,
    padding_token: int | None = None,
    chunk: int | None = None,
    cache=None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate`, (B,) at a time, each as soon as it is known.

    Arguments are those of `generate`, checked at once. After an early stop the cache holds all
    tokens but the last one yielded.
    """
    check_prompts(input_ids, max_new_tokens, key_mask, chunk)
    choose, ends = Choice(temperature, top_k, top_p, generator), Ends(end_token, padding_token)
    prompts, lengths = aligned(input_ids, key_mask)
    needed = prompts.shape[1] + max(max_new_tokens - 1, 0)  # the last token is never read
    check_room(cache, prompts.shape[0], needed)
    if cache is None:
        cache = model.init_cache(prompts.shape[0], needed)
    return _tokens(
        model, prompts, lengths, max_new_tokens, choose, ends, chunk or prompts.shape[1], cache
    )


@torch.no_grad()
def _tokens(model, prompts, lengths, count, choose, ends, chunk, cache) -> Iterator[Tensor]:
    logits = read(model, prompts, lengths, chunk, cache)
    finished = torch.zeros(prompts.shape[0], dtype=torch.bool, device=prompts.device)
    anyone = False  # is finished
    for number in range(count):
        token = choose(logits).to(prompts.dtype)
        if ends:
            token = token.masked_fill(finished, ends.filler)
            finished = finished | ends.reached(token)
            anyone = bool(finished.any())
        yield token
        if number + 1 == count or (anyone and bool(finished.all())):
            return
        # what is finished is read no further: the caller's cache holds the conversation alone
        taking_part = ~finished[:, None] if anyone else None
        logits = model(token[:, None], key_mask=taking_part, cache=cache)[:, -1]
