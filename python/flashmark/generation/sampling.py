"""One token after the other from a model with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashmark.generation.choice import Choice
from flashmark.generation.graphs import Step, capture, check_graph
from flashmark.generation.prompts import (
    CachedModel,
    Ends,
    aligned,
    check_prompts,
    check_room,
    read,
)

LOOK_EVERY = 16  # tokens from one look at which samples have finished to the next, on a GPU
WARM_UP = 2  # steps before one is captured: kernels are compiled, memory is allocated


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
    cuda_graph: bool = False,
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
        cuda_graph: capture one step and replay it, which takes the host's time out of a token. On
            a GPU alone, for a model whose caches are updated in place, as ours are.

    Returns:
        (B, T) new tokens, T <= max_new_tokens, without the prompts.

    Raises:
        ValueError, TypeError: an argument out of range, or a cache too small for the tokens.

    On a GPU whether all samples have finished is looked at every 16 tokens: each look waits for the
    device. Tokens beyond the last end are cut off; random numbers have been drawn for them.

    A sample of a batch gets the tokens that it gets alone, whatever the padding. Afterwards `cache`
    holds each sample's prompt and new tokens but the last (the end token, if it has one): the next
    turn of a conversation begins with that token.
    """
    max_new_tokens, chunk = check_prompts(input_ids, max_new_tokens, key_mask, chunk)
    if cuda_graph:
        check_graph(input_ids.device, cache)
    choose, ends = Choice(temperature, top_k, top_p, generator), Ends(end_token, padding_token)
    every = LOOK_EVERY if cuda_graph or input_ids.device.type != "cpu" else 1
    steps = _steps(
        model, input_ids, key_mask, max_new_tokens, choose, ends, chunk, cache, every, cuda_graph
    )
    tokens = list(steps)
    if not tokens:
        return input_ids[:, :0]
    new = torch.stack(tokens, dim=1)
    if ends and every > 1 and new.shape[0]:
        going_on = ~ends.reached(new).cummax(1).values.all(0)
        new = new[:, : int(going_on.sum()) + 1]
    return new


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
    max_new_tokens, chunk = check_prompts(input_ids, max_new_tokens, key_mask, chunk)
    choose, ends = Choice(temperature, top_k, top_p, generator), Ends(end_token, padding_token)
    return _steps(model, input_ids, key_mask, max_new_tokens, choose, ends, chunk, cache, 1, False)


def _steps(
    model, input_ids, key_mask, count, choose, ends, chunk, cache, every, cuda_graph
) -> Iterator[Tensor]:
    prompts, lengths = aligned(input_ids, key_mask)
    needed = prompts.shape[1] + max(count - 1, 0)  # the last token is never read
    check_room(cache, prompts.shape[0], needed)
    if cache is None:
        cache = model.init_cache(prompts.shape[0], needed)
    return _tokens(model, prompts, lengths, count, choose, ends, chunk, cache, every, cuda_graph)


@torch.no_grad()
def _tokens(
    model, prompts, lengths, count, choose, ends, chunk, cache, every, cuda_graph
) -> Iterator[Tensor]:
    logits = read(model, prompts, lengths, chunk, cache)
    if not count:
        return
    step = Step(model, cache, choose, ends, prompts)
    step.take(logits)
    anyone = bool(ends) and every > 1  # may have finished
    run = step
    for number in range(1, count + 1):
        over = False
        if ends and number % every == 0:
            anyone = anyone or bool(step.finished.any())
            over = anyone and bool(step.finished.all())
        yield step.token.clone()
        if over or number == count:
            return
        # what is finished is read no further: the caller's cache holds the conversation alone
        step.masked = anyone
        if cuda_graph and number == WARM_UP + 1:
            run = capture(step, choose.generator)
        run()
