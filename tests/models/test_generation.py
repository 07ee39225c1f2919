"""generate: cached equals uncached, padding, sampling, ends; parallel decoding from a prefix."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import masks
from flashmark.generation import generate, predict_in_parallel, stream
from flashmark.models import Decoder, DecoderConfig
from flashmark.objectives import IGNORED, token_loss
from tests import helpers

VOCABULARY = 37
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY, width=32, layers=2, heads=4, kv_heads=2, hidden=40, window=6,
    landmarks=4, tied=False,
)  # fmt: skip
ATTENTIONS = {
    "exact": {"attention": "exact"},
    "exact-learned": {"positions": "learned", "max_length": 64},
    "window": {"attention": "window"},
    "sinks": {"mask": masks.causal() & (masks.sliding_window(6) | masks.prefix(2))},
    "nystrom": {"attention": "nystrom", "convolution": 3},
    "hybrid": {"attention": "hybrid"},
    "routed": {"attention": "routed", "block_size": 4, "top_k": 2, "near": 0, "block_landmarks": 3},
    "all-three": {"attention": ("exact", "nystrom", "hybrid"), "layers": 3},
}


def model(**options):
    torch.manual_seed(0)
    return Decoder(dataclasses.replace(CONFIG, **options)).eval()


def ids(*shape, seed=1):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def uncached(decoder, prompt, count):
    for _ in range(count):
        with torch.no_grad():
            new = decoder(prompt)[:, -1].argmax(-1)
        prompt = torch.cat([prompt, new[:, None]], 1)
    return prompt[:, -count:]


@pytest.mark.parametrize("chunk", [None, 1, 5], ids=["whole", "chunk1", "chunk5"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_cached_equals_uncached_token_by_token(name, chunk):
    decoder, prompt = model(**ATTENTIONS[name]), ids(3, 13)
    actual = generate(decoder, prompt, 20, chunk=chunk)
    assert torch.equal(actual, uncached(decoder, prompt, 20))


@pytest.mark.parametrize("chunk", [None, 4], ids=["whole", "chunk4"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_prompt_in_a_padded_batch_continues_as_it_does_alone(name, side, chunk):
    decoder, prompts = model(**ATTENTIONS[name]), ids(4, 21)
    lengths = [21, 3, 14, 1]
    mask = torch.arange(21) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    actual = generate(decoder, prompts, 12, key_mask=mask, chunk=chunk)
    for row in range(4):
        alone = uncached(decoder, prompts[row, mask[row]][None], 12)
        assert torch.equal(actual[row], alone[0])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_cache_continues_where_it_was_left(name):
    decoder, prompt = model(**ATTENTIONS[name]), ids(2, 9)
    expected = uncached(decoder, prompt, 15)
    cache = decoder.init_cache(2, 24)
    first = generate(decoder, prompt, 6, cache=cache)
    second = generate(decoder, first[:, -1:], 9, cache=cache)
    assert torch.equal(torch.cat([first, second], 1), expected)


def test_the_cache_is_exactly_as_long_as_needed():
    decoder, asked = model(), []
    make = decoder.init_cache

    def spy(batch, max_length):
        asked.append((batch, max_length))
        return make(batch, max_length)

    decoder.init_cache = spy
    mask = torch.arange(12) < torch.tensor([[9], [4]])
    generate(decoder, ids(2, 12), 5, key_mask=mask)
    assert asked == [(2, 13)]  # the longest prompt and all new tokens but the last


def test_no_mask_is_compiled_while_decoding():
    calls = []

    def fn(b, h, q, kv):
        calls.append(1)
        return q >= kv

    decoder = model(mask=masks.mask_mod(fn))
    cache = decoder.init_cache(2, 30)
    calls.clear()
    generate(decoder, ids(2, 10), 15, cache=cache, chunk=4)
    assert not calls


@pytest.mark.parametrize("filler", [None, 36], ids=["end", "padding"])
def test_samples_end_at_their_end_token(filler):
    decoder, prompt = model(), ids(5, 6)
    free = generate(decoder, prompt, 16)
    end = int(free[0, 4])
    ended = generate(decoder, prompt, 16, end_token=end, padding_token=filler)
    last = 0
    for row in range(5):
        places = (free[row] == end).nonzero()
        stop = int(places[0]) + 1 if len(places) else 16
        last = max(last, stop)
        assert torch.equal(ended[row, :stop], free[row, :stop])
        assert (ended[row, stop:] == (end if filler is None else filler)).all()
    assert ended.shape == (5, last)


def test_any_of_several_end_tokens_ends_a_sample():
    decoder, prompt = model(), ids(4, 6)
    free = generate(decoder, prompt, 16)
    ends = [int(free[0, 3]), int(free[1, 5])]
    ended = generate(decoder, prompt, 16, end_token=ends)
    for row, found in zip(free, ended, strict=True):
        places = torch.isin(row, torch.tensor(ends)).nonzero()
        stop = int(places[0]) + 1 if len(places) else len(found)
        assert torch.equal(found[:stop], row[:stop]) and (found[stop:] == ends[0]).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_three_turns_of_a_conversation_equal_it_alone(name, side):
    """A sample that ends early keeps its own conversation in the cache, nothing else."""
    decoder = model(**ATTENTIONS[name])
    cache = decoder.init_cache(3, 64)
    end = int(generate(decoder, ids(3, 6), 3)[1, 1])
    said = list(ids(3, 6))
    unread = list(said)
    for turn in range(3):
        longest = max(len(x) for x in unread)
        pads = [(0, longest - len(x)) if side == "right" else (longest - len(x), 0) for x in unread]
        pad = torch.nn.functional.pad
        prompts = torch.stack([pad(x, p) for x, p in zip(unread, pads, strict=True)])
        key_mask = torch.stack(
            [pad(torch.ones_like(x), p) > 0 for x, p in zip(unread, pads, strict=True)]
        )
        answers = generate(decoder, prompts, 7, key_mask=key_mask, end_token=end, cache=cache)
        for row in range(3):
            alone = generate(decoder, said[row][None], 7, end_token=end)[0]
            assert torch.equal(answers[row, : len(alone)], alone)
            assert (answers[row, len(alone) :] == end).all()
            said[row] = torch.cat([said[row], alone])
            assert int(cache.length[row]) == len(said[row]) - 1
            words = ids(1, 2 + row, seed=turn)[0]
            unread[row] = torch.cat([said[row][-1:], words])
            said[row] = torch.cat([said[row], words])


def test_a_stream_gives_each_token_as_soon_as_it_is_known():
    decoder, prompt = model(), ids(3, 6)
    cache = decoder.init_cache(3, 20)
    tokens = stream(decoder, prompt, 15, cache=cache)
    assert cache.length.tolist() == [0] * 3
    held = []
    for count, token in enumerate(tokens):
        held.append(token)
        assert cache.length.tolist() == [6 + count] * 3
        if count == 8:
            break
    assert torch.equal(torch.stack(held, 1), generate(decoder, prompt, 9))
    rest = generate(decoder, held[-1][:, None], 6, cache=cache)
    assert torch.equal(rest, generate(decoder, prompt, 15)[:, 9:])


def test_arguments_of_a_stream_are_checked_before_its_first_token():
    with pytest.raises(ValueError, match="max_new_tokens: expected"):
        stream(model(), ids(2, 5), -1)


class Fixed:
    """A model whose next token always has the same logits."""

    def __init__(self, probabilities):
        self.logits = torch.tensor(probabilities).log()

    def init_cache(self, batch, max_length):
        return None

    def __call__(self, ids, *, key_mask=None, cache=None):
        return self.logits.expand(*ids.shape, -1)


P = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, P),
        ({"temperature": 0.5}, [p * p / 0.285 for p in P]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 99}, P),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.1}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0}, P),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(options, expected):
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    options = {"temperature": 1.0} | options
    out = generate(Fixed(P), ids(n, 1), 2, generator=generator, **options)
    shares = torch.bincount(out.flatten(), minlength=5) / (2 * n)
    for share, p in zip(shares.tolist(), expected, strict=True):
        assert abs(share - p) <= 5 * (p * (1 - p) / (2 * n)) ** 0.5


def test_samples_repeat_with_their_generator():
    decoder, prompt = model(), ids(3, 5)
    first, again, other = (
        generate(decoder, prompt, 20, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_nothing_to_do():
    decoder = model()
    assert generate(decoder, ids(2, 5), 0).shape == (2, 0)
    assert generate(decoder, ids(0, 5), 3).shape == (0, 3)


# Parallel decoding: each place sees the first tokens and itself

PREFIX, COUNT = 11, 25


def pinned(**options):
    return model(mask=masks.pinned(PREFIX), **options)


def test_all_places_at_once_equal_one_at_a_time_bitwise():
    """Calls of one shape: matrix products of torch may round differently in another."""
    decoder, prefix, places = pinned(), ids(2, PREFIX), ids(2, COUNT, seed=2)
    together = predict_in_parallel(decoder, prefix, places)
    for place in range(COUNT):
        others = (places + 1 + place) % VOCABULARY
        others[:, place] = places[:, place]
        alone = predict_in_parallel(decoder, prefix, others)
        helpers.assert_identical(alone[:, place], together[:, place])


def test_the_number_of_places_asked_for_has_no_influence():
    decoder, prefix, places = pinned(), ids(2, PREFIX), ids(2, COUNT, seed=2)
    together = predict_in_parallel(decoder, prefix, places)
    for count in (1, 2, 17):
        fewer = predict_in_parallel(decoder, prefix, places[:, :count])
        helpers.assert_close(fewer, together[:, :count], 1e-6)


def test_places_in_a_cache_equal_all_at_once():
    decoder, prefix, places = pinned(), ids(2, PREFIX), ids(2, COUNT, seed=2)
    together = predict_in_parallel(decoder, prefix, places)
    cache = decoder.init_cache(2, PREFIX + COUNT)
    with torch.no_grad():
        decoder(prefix, cache=cache)
        steps = [decoder(place, cache=cache) for place in places.split(1, dim=1)]
    helpers.assert_close(torch.cat(steps, 1), together, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefixes_of_different_lengths(side):
    """Each place sees the prefix of its own sample and itself, however the prefix is padded."""
    decoder, prefix, places = model(), ids(3, PREFIX), ids(3, 6, seed=2)
    lengths = torch.tensor([PREFIX, 2, 5])
    key_mask = torch.arange(PREFIX) < lengths[:, None]
    key_mask = key_mask.flip(1) if side == "left" else key_mask
    mask = masks.causal() & masks.pinned(lengths)
    together = predict_in_parallel(decoder, prefix, places, key_mask=key_mask, mask=mask)
    for row, n in enumerate(lengths.tolist()):
        alone = model(mask=masks.causal() & masks.pinned(n))
        own = prefix[row, key_mask[row]][None]
        expected = predict_in_parallel(alone, own, places[row : row + 1])
        helpers.assert_close(together[row], expected[0], 1e-5)


def test_the_gradient_of_one_place_passes_no_other():
    decoder = pinned(positions="learned", max_length=40)
    tokens = ids(2, PREFIX + COUNT)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, PREFIX + 3] = 5
    token_loss(decoder(tokens), targets).backward()
    touched = decoder.positions.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [*range(PREFIX), PREFIX + 3]


def small(**options):
    return lambda: generate(model(), ids(2, 5), 4, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: generate(m := model(), ids(2, 5), 4, cache=m.init_cache(2, 7)),
            r"cache: expected room for 8 tokens \(held, prompt and new ones\), got max_length 7",
        ),
        (
            lambda: generate(m := model(), ids(2, 9), 1, cache=m.init_cache(2, 8)),
            r"cache: expected room for 9 tokens \(held, prompt and new ones\), got max_length 8",
        ),
        (
            lambda: generate(m := model(), ids(2, 5), 4, cache=m.init_cache(3, 8)),
            "cache: expected a batch of 2 like input_ids, got 3",
        ),
        (
            small(key_mask=torch.ones(2, 9).bool()),
            r"key_mask: expected shape \(2, 5\), one bool a token of this call, got \(2, 9\)",
        ),
        (
            small(key_mask=torch.tensor([[True] * 5, [False] * 5])),
            "key_mask: expected at least one token in every prompt, got none in one",
        ),
        (
            lambda: generate(model(positions="learned", max_length=7), ids(2, 5), 4),
            "max_length: expected at most 7, the learned positions, got 8",
        ),
        (
            lambda: generate(model(), ids(2, 5)[:, :0], 4),
            "input_ids: expected at least one token, got none",
        ),
        (
            lambda: generate(model(), ids(5), 4),
            r"input_ids: expected a tensor of shape \(B, N\), got \(5,\)",
        ),
        (
            lambda: generate(model(), ids(2, 5), -1),
            "max_new_tokens: expected an int >= 0, got -1",
        ),
        (small(chunk=0), "chunk: expected an int >= 1, got 0"),
        (small(temperature=-1.0), "temperature: expected a number >= 0, got -1.0"),
        (small(temperature=1.0, top_k=0), "top_k: expected an int >= 1, got 0"),
        (small(temperature=1.0, top_p=0.0), r"top_p: expected a number in \(0, 1\], got 0.0"),
        (
            lambda: predict_in_parallel(model(), ids(2, 5), ids(3, 4)),
            "places: expected a batch of 2 like prefix, got 3",
        ),
    ],
    ids=lambda x: x.split(":")[0] if isinstance(x, str) else "",
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
