"""Training signals of a router: the attention mass of the chosen blocks, and its own guess."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashmark.autograd import reached, without_autocast
from flashmark.routed.checks import Checked
from flashmark.routed.places import Blocks
from flashmark.routed.summaries import RoutedState, log_total, scores_of

NEG_INF = float("-inf")
TILE_ELEMENTS = 2**22  # of the keys that a tile of queries gathers
DENSE = 16  # a gathered key costs more than this many in a product with all of them


class Routing(NamedTuple):
    """The choice of blocks, what attention found in them, and what the router expected.

    All are (B, Hkv, Nq, K), best block first.
    """

    indices: Tensor  # int32: blocks counted from their sequence's start; -1 where there are fewer
    mass: Tensor  # share of the attention that falls on the block, mean over the group's heads
    # log of the share among them that the router expected, differentiable; -inf where no block
    log_probs: Tensor


def routing_of(
    query: Tensor, key: Tensor, state: RoutedState | None, scores: Tensor | None, indices: Tensor,
    lse: Tensor, block_size: int, checked: Checked,
) -> Routing:  # fmt: skip
    """Routing of a call that chose by `state`, or by `scores`. Gradients reach these two only, a
    tile of queries at a time; query and key are constants, as in DeepSeek's sparse attention
    (2025)."""
    query, key, chosen = query.detach(), key.detach(), indices.long()
    with without_autocast(query.device.type):
        blocks, places = checked.blocks(key, block_size), checked.places(query, key, block_size)
        number = chosen.clamp(min=0)
        if blocks.base is not None:
            number = number + blocks.base[places.at.clamp(min=0)][:, None, :, None]
        size = max(block_size, 1 if state is None else state.keys.shape[3])
        count = max(1, TILE_ELEMENTS // max(1, chosen[:, :, :1].numel() * size * key.shape[3]))
        mass, expected = [], []
        for begin in range(0, query.shape[2], count):
            rows = slice(begin, begin + count)
            part, at = query[:, :, rows], number[:, :, rows]
            mass.append(
                _mass(
                    part,
                    key,
                    checked.keep,
                    lse[:, :, rows],
                    at,
                    blocks,
                    checked.scale,
                    checked.softcap,
                )  # fmt: skip
            )
            if state is None:
                assert scores is not None
                expected.append(scores[:, :, rows].gather(3, chosen[:, :, rows].clamp(min=0)))
                continue
            given = (part, *state, lse[:, :, rows], at, checked.scale)
            if state.keys.requires_grad and count < query.shape[2]:  # keep no tile's products
                expected.append(checkpoint(_scores, *given, use_reentrant=False))
            else:
                expected.append(_scores(*given))
        none = chosen < 0
        if not mass:
            empty = lse.new_zeros(chosen.shape)
            return Routing(indices, empty, reached(empty.clone(), *(state or [scores])))
        logits = torch.cat(expected, 2).to(lse.dtype).masked_fill(none, NEG_INF)
        alone = none.all(-1, keepdim=True)
        log_probs = torch.log_softmax(logits.masked_fill(alone, 0.0), -1).masked_fill(none, NEG_INF)
        return Routing(indices, torch.cat(mass, 2).masked_fill(none, 0.0), log_probs)


def _scores(
    query: Tensor, keys: Tensor, logs: Tensor, lse: Tensor, number: Tensor, scale: float
) -> Tensor:
    """Log of the attention (B, Hkv, n, K), summed over a group's heads, that the summaries expect
    of blocks `number`: of each head, exp(score - lse) with the formula of `summaries.scores_of`."""
    totals = lse.unflatten(1, (keys.shape[1], -1)).to(keys.dtype)  # (B, Hkv, G, n)
    totals = totals.masked_fill(totals == NEG_INF, 0.0)[..., None]
    if keys.shape[2] <= DENSE * number.shape[3]:
        each = scores_of(query, RoutedState(keys, logs), scale) - totals
        return log_total(each, (2,)).gather(3, number)
    batch, head = _outer(keys)
    grouped = query.unflatten(1, (keys.shape[1], -1)).to(keys.dtype)  # (B, Hkv, G, n, D)
    near = keys[batch, head, number]  # (B, Hkv, n, K, M, D)
    each = scale * torch.einsum("bhgnd,bhnkmd->bhgnkm", grouped, near)
    each = each + logs[batch, head, number][:, :, None] - totals[..., None]
    return log_total(each, (2, 5))


def _mass(
    query: Tensor, key: Tensor, keep: Tensor | None, lse: Tensor, number: Tensor, blocks: Blocks,
    scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Share (B, Hkv, n, K) of the attention that blocks `number` get, mean over the group."""
    batch, head = _outer(key)
    grouped = query.unflatten(1, (key.shape[1], -1)).to(lse.dtype)
    totals = lse.unflatten(1, (key.shape[1], -1))  # (B, Hkv, G, n)
    totals = totals.masked_fill(totals == NEG_INF, float("inf"))
    (rows, chosen), size = number.shape[2:], blocks.tokens.shape[1]
    if key.shape[2] <= min(DENSE, rows) * chosen * size:
        k = key.to(lse.dtype)
        if keep is not None:
            k = k.masked_fill(~keep[:, None, :, None], 0.0)
        s = scale * torch.einsum("bhgnd,bhtd->bhgnt", grouped, k)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        # no key that was read is above the total; the others must not overflow
        p = torch.exp((s - totals[..., None]).clamp(max=0.0)).mean(2)
        if keep is not None:
            p = p.masked_fill(~keep[:, None, None], 0.0)
        count = blocks.tokens.shape[0]
        member = torch.zeros(count, key.shape[2], dtype=p.dtype, device=p.device)
        member.scatter_add_(1, blocks.tokens, blocks.inside.to(p.dtype))
        return (p @ member.mT).gather(3, number)
    found = []
    for n in range(chosen):
        tokens = blocks.tokens[number[..., n]]  # (B, Hkv, n, s)
        inside = blocks.inside[number[..., n]]
        if keep is not None:
            inside = inside & keep[batch, tokens]
        k = key[batch, head, tokens].to(lse.dtype).masked_fill(~inside[..., None], 0.0)
        s = scale * torch.einsum("bhgnd,bhnsd->bhgns", grouped, k)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        p = torch.exp(s - totals[..., None]).masked_fill(~inside[:, :, None], 0.0)
        found.append(p.sum(-1).mean(2))
    if not found:
        return lse.new_zeros(number.shape)
    return torch.stack(found, -1)


def _outer(x: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    return batch, torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
