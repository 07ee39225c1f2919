"""Caches that forget: samples selected, tokens taken back, files written and read."""

from __future__ import annotations

import io

import pytest
import torch

from flashmark import masks
from flashmark.nn import BlockSparseAttention, StateCache
from tests import helpers
from tests.nn.test_cache import MODULES, WIDTH, made

N = 26
STATES = [name for name in MODULES if not name.startswith(("exact", "routed"))]


def filled(module, x, sizes, rollback=0):
    cache = module.init_cache(x.shape[0], 64)
    if rollback and isinstance(cache, StateCache):
        cache.allow_rollback(rollback)
    for part in x.split(sizes, 1):
        module(part, cache=cache)
    return cache


@pytest.mark.parametrize("name", MODULES)
def test_selected_samples_go_on_as_they_were(name):
    module, x = made(name), helpers.randn(3, N, WIDTH)
    order = torch.tensor([2, 0, 2, 1])
    cache = filled(module, x[:, :17], [16, 1], rollback=3)
    cache.select(order)
    out = module(x[order, 17:], cache=cache)
    helpers.assert_close(out, module(x)[order, 17:], 1e-5)
    assert cache.length.tolist() == [N] * 4


@pytest.mark.parametrize("sizes", [[17], [9, 8], [8] + [1] * 9, [0, 11, 2, 4]], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_tokens_taken_back_are_as_if_never_read(name, sizes):
    module, x = made(name), helpers.randn(3, 17, WIDTH)
    cache = filled(module, x, sizes, rollback=4)
    kept = [17, 15, 13]
    cache.crop(torch.tensor(kept))
    assert cache.length.tolist() == kept
    more = helpers.randn(3, 6, WIDTH, seed=4)
    out = module(more, cache=cache)
    for row, n in enumerate(kept):
        whole = module(torch.cat([x[row, :n], more[row]])[None])
        helpers.assert_close(out[row], whole[0, n:], 1e-5)


@pytest.mark.parametrize("name", STATES)
def test_tokens_are_taken_back_again_and_again(name):
    """Each round reads 4 tokens and keeps some of them; samples rest in some rounds."""
    module, cache = made(name), made(name).init_cache(2)
    cache.allow_rollback(4)
    kept = [helpers.randn(0, WIDTH) for _ in range(2)]
    for step in range(9):
        x = helpers.randn(2, 4, WIDTH, seed=step)
        read = torch.tensor([[True] * 4, [step % 3 > 0] * 4])
        out = module(x, key_mask=read if step % 3 == 0 else None, cache=cache)
        counts = [(3 * step + 1) % 5, 2 if step % 3 else 0]
        for row in range(2):
            if not read[row].any():
                continue
            whole = module(torch.cat([kept[row], x[row]])[None])
            helpers.assert_close(out[row], whole[0, len(kept[row]) :], 1e-5)
            kept[row] = torch.cat([kept[row], x[row, : counts[row]]])
        cache.crop(torch.tensor([len(x) for x in kept]))


@pytest.mark.parametrize("name", STATES)
def test_what_is_kept_for_a_rollback_does_not_grow(name):
    module = made(name)
    x = helpers.randn(2, 60, WIDTH)
    held = []
    for n in (20, 60):
        cache = module.init_cache(2)
        cache.allow_rollback(3)
        for token in x[:, :n].split(1, 1):  # the second sample has ended after 5 tokens
            key_mask = torch.tensor([[True], [int(cache.length[1]) < 5]])
            module(token, key_mask=key_mask, cache=cache)
        file = io.BytesIO()
        torch.save(cache, file)
        held.append(file.tell())
    assert abs(held[1] - held[0]) < 0.2 * held[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_cropped_cache_is_saved_and_loaded(name):
    module, x = made(name), helpers.randn(2, N, WIDTH)
    cache = filled(module, x, [20, 6], rollback=5)
    cache.crop(22)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is type(cache)
    helpers.assert_identical(module(x[:, 22:], cache=loaded), module(x[:, 22:], cache=cache))


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_prompt_and_steps_in_different_precision(name, first):
    """Autocast for one of the two: the cache keeps the dtype it began with."""
    module, x = made(name), helpers.randn(2, N, WIDTH)
    cache = module.init_cache(2, N)
    parts = []
    for part, low in zip(x.split([20, 6], 1), (first, torch.float32), strict=True):
        autocast = low == torch.bfloat16 if first == torch.bfloat16 else part.shape[1] == 6
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts.append(module(part, cache=cache).float())
    helpers.assert_close(torch.cat(parts, 1), module(x), 5e-2)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda c: c.crop(11), ValueError, r"length: expected at least \[12, 12\], since 3 tokens"),
        (lambda c: c.crop(-1), ValueError, "length: expected numbers >= 0, got -1"),
        (lambda c: c.crop(torch.ones(3).int()), ValueError, r"an int or shape \(2,\), got \(3,\)"),
        (lambda c: c.crop(2.0), TypeError, "length: expected an int or a tensor, got float"),
        (lambda c: c.crop(torch.ones(2)), TypeError, "length: expected integers, got torch.float"),
        (lambda c: c.allow_rollback(0), ValueError, "tokens: expected an int >= 1, got 0"),
    ],
)
def test_what_cannot_be_taken_back(act, error, words):
    module = made("nystrom")
    cache = filled(module, helpers.randn(2, 16, WIDTH), [15, 1], rollback=3)
    with pytest.raises(error, match=words):
        act(cache)
    assert cache.length.tolist() == [16, 16]


def test_a_state_needs_leave_to_forget():
    cache = filled(made("slots"), helpers.randn(2, 9, WIDTH), [9])
    with pytest.raises(ValueError, match=r"cache: expected allow_rollback\(tokens\) before a crop"):
        cache.crop(8)
    cache.crop(9)  # nothing is taken back


def test_samples_with_masks_of_their_own_are_not_selected():
    lengths = torch.tensor([2, 5])
    module = BlockSparseAttention(WIDTH, 4, mask=masks.causal() & ~masks.prefix(lengths))
    cache = module.init_cache(2, 8)
    with pytest.raises(NotImplementedError, match="cache: expected a mask that is the same"):
        cache.select(torch.tensor([1, 0]))
