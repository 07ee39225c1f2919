"""The likeliest continuations of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import check_count, finite
from flashmark.generation.prompts import CachedModel, Ends, aligned, check_prompts, read


class Beams(NamedTuple):
    """The result of `beam_search`, best first."""

    tokens: Tensor  # (B, beams, T): new tokens, filled after an end token
    scores: Tensor  # (B, beams) float32: log probability / length ** length_penalty


@torch.no_grad()
def beam_search(
    model: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    beams: int,
    key_mask: Tensor | None = None,
    end_token: int | Sequence[int] | None = None,
    padding_token: int | None = None,
    length_penalty: float = 1.0,
    chunk: int | None = None,
) -> Beams:
    """The best of the continuations that are made by keeping the `beams` best after each token.

    A finished continuation keeps its place as long as it is among the best; the search ends when
    all are finished. Scores are log probabilities divided by length ** length_penalty, the end
    token counted: 0 compares plain probabilities, larger numbers favour long continuations.

    Args:
        model, input_ids, max_new_tokens, key_mask, end_token, padding_token, chunk: as for
            `generate`. The model's cache needs `select(index)`, as all of this package have.
        beams: how many continuations of each prompt are kept, >= 1; 1 is greedy.
        length_penalty: exponent of the length.

    Raises:
        ValueError, TypeError: an argument out of range.

    The prompt is read once; each further token costs one step of B * beams samples and a copy of
    their caches in the new order.
    """
    max_new_tokens, chunk = check_prompts(input_ids, max_new_tokens, key_mask, chunk)
    beams = check_count("beams", beams)
    penalty, ends = finite("length_penalty", length_penalty), Ends(end_token, padding_token)
    prompts, lengths = aligned(input_ids, key_mask)
    batch, device = prompts.shape[0], prompts.device
    tokens = prompts.new_empty(batch, beams, 0)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # so far all beams are alike: one of them stands for all
    counts = torch.zeros(batch, beams, dtype=torch.long, device=device)
    finished = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    ranked = scores
    if not max_new_tokens or not batch:
        return Beams(tokens, scores)

    cache = model.init_cache(batch, prompts.shape[1] + max_new_tokens - 1)
    logits = read(model, prompts, lengths, chunk, cache)
    first_row = torch.arange(batch, device=device)[:, None] * beams
    cache.select(torch.arange(batch, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, 0)
    for number in range(max_new_tokens):
        steps = logits.float().log_softmax(-1).unflatten(0, (batch, beams))  # (B, beams, V)
        # a finished one has one continuation, itself
        stays = torch.full_like(steps, -torch.inf)
        stays[..., 0] = 0.0
        steps = torch.where(finished[..., None], stays, steps)
        total = scores[..., None] + steps
        length = (counts + ~finished)[..., None].float()
        ranked, chosen = (total / length**penalty).flatten(1).topk(beams)
        beam, token = chosen // steps.shape[-1], chosen % steps.shape[-1]
        scores = total.flatten(1).gather(1, chosen)
        tokens = tokens.gather(1, beam[..., None].expand(-1, -1, number))
        counts, finished = counts.gather(1, beam), finished.gather(1, beam)
        token = token.to(prompts.dtype)
        if ends:
            token = token.masked_fill(finished, ends.filler)
        tokens, counts = torch.cat([tokens, token[..., None]], 2), counts + ~finished
        if ends:
            finished = finished | ends.reached(token)
        if number + 1 == max_new_tokens or bool(finished.all()):
            break
        cache.select((first_row + beam).flatten())
        taking_part = ~finished.flatten()[:, None] if bool(finished.any()) else None
        logits = model(token.flatten()[:, None], key_mask=taking_part, cache=cache)[:, -1]
    return Beams(tokens, ranked)
