"""A small model proposes tokens, a large one checks several of them in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmark.arguments import check_count
from flashmark.generation.choice import Choice
from flashmark.generation.prompts import CachedModel, Ends, aligned, check_prompts, read


@torch.no_grad()
def generate_assisted(
    model: CachedModel,
    draft: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    ahead: int = 4,
    key_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | Sequence[int] | None = None,
    padding_token: int | None = None,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens of `generate`, in fewer calls of `model`: `draft` proposes, `model` checks.

    Greedy tokens are those of `generate` (where two logits tie to the last bit, either may win);
    sampled ones have the same distribution. Source: Leviathan et al., "Fast inference from
    transformers via speculative decoding" (2023).

    Args:
        model, draft: of one vocabulary, with `init_cache(batch, max_length, rollback=)` whose
            caches have `crop`. Proposals that are refused are taken back from both.
        ahead: tokens that `draft` proposes at a time, >= 1.
        input_ids, max_new_tokens, key_mask, temperature, top_k, top_p, end_token, padding_token,
            chunk, generator: as for `generate`.

    Returns:
        (B, T) new tokens, T <= max_new_tokens.

    Raises:
        ValueError, TypeError: an argument out of range.

    A round costs ahead + 1 steps of `draft` and one call of `model` with ahead + 1 tokens. Keys and
    values are taken back at no cost; a state is computed again from an older one, over at most
    2 (ahead + 1) tokens.
    """
    max_new_tokens, chunk = check_prompts(input_ids, max_new_tokens, key_mask, chunk)
    ahead = check_count("ahead", ahead)
    choose, ends = Choice(temperature, top_k, top_p, generator), Ends(end_token, padding_token)
    prompts, lengths = aligned(input_ids, key_mask)
    batch, longest = prompts.shape
    if not max_new_tokens or not batch:
        return prompts[:, :0]
    room = longest + max_new_tokens - 1
    caches = [x.init_cache(batch, room, rollback=ahead + 1) for x in (model, draft)]
    logits, _ = (
        read(x, prompts, lengths, chunk, cache)
        for x, cache in zip((model, draft), caches, strict=True)
    )

    filler = ends.filler if ends else 0
    out = torch.full((batch, max_new_tokens), filler, dtype=prompts.dtype, device=prompts.device)
    last = choose(logits).to(prompts.dtype)  # known and not yet read
    out[:, 0] = last
    written = torch.ones(batch, dtype=torch.long, device=prompts.device)
    finished = ends.reached(last) if ends else torch.zeros_like(last, dtype=torch.bool)
    while True:
        left = (max_new_tokens - written).masked_fill(finished, 0)
        count = min(ahead, int(left.max()) - 1)
        if count < 0:
            return out[:, : int(written.max())]
        places = torch.arange(count + 1, device=last.device)
        taking_part = None if bool((left > count).all()) else places < left[:, None]
        proposed, offered = _propose(draft, last, count, taking_part, choose, caches[1])
        tokens = torch.cat([last[:, None], proposed], 1)
        logits = model(tokens, key_mask=taking_part, cache=caches[0])
        wanted = choose.probabilities(logits)  # (B, count + 1, V)
        accepted, extra = _accepted(choose, proposed, offered, wanted)
        new = torch.where(places == accepted[:, None], extra[:, None], F.pad(proposed, (0, 1))).to(
            prompts.dtype
        )  # the first accepted + 1 columns count
        if ends:  # nothing follows an end token
            ended = ends.reached(new) & (places <= accepted[:, None])
            first_end = torch.where(ended, places, count + 1).amin(1)
            accepted = torch.minimum(accepted, first_end)
        accepted = torch.minimum(accepted, left - 1)  # -1 where a sample is finished
        kept = places <= accepted[:, None]
        rows, columns = kept.nonzero(as_tuple=True)
        out[rows, written[rows] + columns] = new[rows, columns]
        final = new.gather(1, accepted.clamp_min(0)[:, None])[:, 0]
        read_before = [cache.length - _tokens_read(left, count) for cache in caches]
        for cache, before in zip(caches, read_before, strict=True):
            cache.crop(before + (accepted + 1).to(before.dtype))
        written = written + accepted + 1
        last = torch.where(accepted >= 0, final, last)
        if ends:
            finished = finished | ends.reached(last)


def _tokens_read(left: Tensor, count: int) -> Tensor:
    return left.clamp(0, count + 1).int()


def _propose(draft, last, count, taking_part, choose, cache) -> tuple[Tensor, Tensor]:
    """`count` tokens (B, count) after `last`, and the draft's probabilities (B, count, V).

    All of them are read, the last one too: if every one is accepted, the next round goes on there.
    """
    tokens, offered, token = [], [], last
    for number in range(count + 1):
        key_mask = None if taking_part is None else taking_part[:, number, None]
        logits = draft(token[:, None], key_mask=key_mask, cache=cache)[:, -1]
        if number == count:
            break
        offered.append(choose.probabilities(logits))
        token = choose(logits).to(last.dtype)
        tokens.append(token)
    if not tokens:
        return last.new_empty(last.shape[0], 0), logits.new_empty(last.shape[0], 0, 1)
    return torch.stack(tokens, 1), torch.stack(offered, 1)


def _accepted(choose, proposed, offered, wanted) -> tuple[Tensor, Tensor]:
    """Number of accepted proposals of each sample, (B,), and the token that follows them, (B,)."""
    batch, count = proposed.shape
    index = proposed.long()[..., None]
    if count:
        p = wanted[:, :count].gather(-1, index)[..., 0]
        q = offered.gather(-1, index)[..., 0]
        stands = choose.uniform(q) * q < p
        accepted = stands.long().cumprod(1).sum(1)
        surplus = (wanted[:, :count] - offered).clamp_min(0)
        nothing = surplus.sum(-1, keepdim=True) <= 0  # equal but for rounding
        surplus = torch.where(nothing, wanted[:, :count], surplus)
        choices = torch.cat([surplus, wanted[:, count:]], 1)
    else:
        accepted, choices = proposed.new_zeros(batch, dtype=torch.long), wanted
    rows = torch.arange(batch, device=proposed.device)
    following = choices[rows, accepted]
    if choose.temperature == 0.0:
        return accepted, following.argmax(-1)
    return accepted, choose.draw(following)
