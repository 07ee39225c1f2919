"""T5: decoding step by step, masks of heads and padding, relative positions, bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from flashmark.generation import generate
from flashmark.models import T5, T5Config
from flashmark.models.t5_layers import RelativeBias
from flashmark.objectives import IGNORED
from tests import helpers

CONFIG = T5Config(
    vocab_size=41, width=16, heads=4, head_dim=6, hidden=24, buckets=8, max_distance=20
)


def model(**options) -> T5:
    torch.manual_seed(0)
    return T5(dataclasses.replace(CONFIG, **options)).eval()


def ids(*shape, seed=1):
    return torch.randint(1, 41, shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(13) < torch.tensor([13, 5, 1])[:, None]


@pytest.mark.parametrize("piece", [1, 4], ids=["steps", "pieces"])
@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["full", "right", "left"])
def test_one_teacher_forced_forward_equals_decoding_in_steps(mask, piece):
    t5, source, target = model(), ids(3, 13), ids(3, 18, seed=2)
    expected = t5(source, target, key_mask=mask).logits
    given = t5.given(source, key_mask=mask)
    cache = given.init_cache(3, 18)
    with torch.no_grad():
        steps = [given(part, cache=cache) for part in target.split(piece, dim=1)]
    helpers.assert_close(torch.cat(steps, 1), expected, 1e-5)
    assert cache.length.tolist() == [18] * 3


def test_padded_source_tokens_have_no_influence():
    t5, source, target = model(), ids(3, 13), ids(3, 7, seed=2)
    expected = t5(source, target, key_mask=MASK).logits
    other = torch.where(MASK, source, ids(3, 13, seed=3))
    helpers.assert_identical(t5(other, target, key_mask=MASK).logits, expected)
    alone = t5(source[1:2, :5], target[1:2]).logits
    helpers.assert_close(expected[1:2], alone, 1e-5)


def test_later_target_tokens_have_no_influence():
    t5, source, target = model(), ids(2, 9), ids(2, 12, seed=2)
    expected = t5(source, target).logits
    target[:, 7:] = ids(2, 5, seed=5)
    helpers.assert_identical(t5(source, target).logits[:, :7], expected[:, :7])


@pytest.mark.parametrize("which", ["head_mask", "decoder_head_mask", "cross_head_mask"])
def test_a_head_masked_with_zero_is_a_head_without_output_weights(which):
    t5, source, target = model(), ids(2, 9), ids(2, 7, seed=2)
    mask = torch.ones(2, 4)
    mask[1, 2] = 0
    actual = t5(source, target, **{which: mask}).logits
    stack = t5.encoder if which == "head_mask" else t5.decoder
    layer = stack.layers[1]
    attention = layer.cross_attention if which == "cross_head_mask" else layer.attention
    with torch.no_grad():
        attention.output.weight[:, 12:18] = 0
    helpers.assert_close(actual, t5(source, target).logits, 1e-5)


def test_a_head_mask_of_one_dimension_is_for_every_layer():
    t5, source, target = model(), ids(2, 9), ids(2, 7, seed=2)
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0])
    actual = t5(source, target, decoder_head_mask=mask).logits
    helpers.assert_identical(actual, t5(source, target, decoder_head_mask=mask.repeat(2, 1)).logits)


def test_ignored_labels_reach_the_decoder_as_padding():
    t5, source, labels = model(padding_token=7, start_token=3), ids(2, 9), ids(2, 6, seed=2)
    labels[:, 4:] = IGNORED
    forced = torch.cat([torch.full((2, 1), 3), labels[:, :-1]], 1)
    forced[:, 5:] = 7
    helpers.assert_identical(t5(source, labels=labels).logits, t5(source, forced).logits)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
def test_buckets_follow_the_distance(bidirectional):
    bias = RelativeBias(dataclasses.replace(CONFIG, buckets=32, max_distance=128), bidirectional)
    relative = torch.arange(-300, 301)
    bucket = dict(zip(relative.tolist(), bias.bucket(relative).tolist(), strict=True))
    half = 16 if bidirectional else 32
    exact = half // 2
    assert [bucket[-d] for d in range(exact)] == list(range(exact))
    past = [bucket[-d] for d in range(301)]
    for distance in range(exact, 301):
        place = exact + math.log(distance / exact) / math.log(128 / exact) * (half - exact)
        if 0.001 < place % 1 < 0.999:  # elsewhere rounding decides
            assert past[distance] == min(int(place), half - 1)
    if bidirectional:
        assert [bucket[d] for d in range(1, 301)] == [half + x for x in past[1:]]
    else:
        assert {bucket[d] for d in range(301)} == {0}


def test_dropout_acts_in_training_only():
    t5, source, target = model(dropout=0.5), ids(2, 9), ids(2, 7, seed=2)
    helpers.assert_identical(t5(source, target).logits, t5(source, target).logits)
    t5.train()
    assert not torch.equal(t5(source, target).logits, t5(source, target).logits)


def test_recomputed_activations_give_the_same_gradients():
    t5, source, labels = model(dropout=0.3).train(), ids(2, 9), ids(2, 7, seed=2)
    gradients = []
    for t5.recompute in (False, True):
        t5.zero_grad()
        torch.manual_seed(3)
        t5(source, labels=labels, key_mask=torch.ones(2, 9).bool()).loss.backward()
        gradients.append([p.grad.clone() for p in t5.parameters()])
    for plain, again in zip(*gradients, strict=True):
        helpers.assert_close(again, plain, 1e-6)


def test_generation_equals_the_argmax_of_growing_forwards():
    t5, source = model(), ids(3, 13)
    tokens = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(10):
        new = t5(source, tokens, key_mask=MASK).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, new[:, None]], 1)
    given = t5.given(source, key_mask=MASK)
    assert torch.equal(generate(given, tokens[:, :1], 10), tokens[:, 1:])


def cached(t5, rows=2, length=4):
    return {"encoded": t5.encode(ids(rows, 5)), "cache": t5.init_cache(rows, length)}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda t5: T5(dataclasses.replace(CONFIG, start_token=None))(
                ids(1, 3), labels=ids(1, 3)
            ),
            ValueError,
            "start_token: expected a token id to shift the labels right, got None",
        ),
        (
            lambda t5: t5(ids(1, 3)),
            ValueError,
            "decoder_input_ids: expected a tensor or labels, got neither",
        ),
        (
            lambda t5: t5(ids(2, 3), ids(2, 3), key_mask=torch.ones(2, 4).bool()),
            ValueError,
            r"key_mask: expected shape \(2, 3\), one bool a token of this call, got \(2, 4\)",
        ),
        (
            lambda t5: t5(ids(2, 3), ids(2, 3), head_mask=torch.ones(3)),
            ValueError,
            r"head_mask: expected shape \(2, 4\) or \(4,\), got \(3,\)",
        ),
        (
            lambda t5: t5(ids(2, 3) + 60, ids(2, 3)),
            ValueError,
            r"input_ids: expected token ids from 0 to 40, got \d+",
        ),
        (
            lambda t5: t5.decode(ids(2, 5), **cached(t5)),
            ValueError,
            "cache: expected room for 5 tokens, got max_length 4",
        ),
        (
            lambda t5: t5.decode(ids(3, 1), **cached(t5)),
            ValueError,
            "cache: expected a batch of 3 like decoder_input_ids, got 2",
        ),
        (
            lambda t5: t5.decode(ids(2, 1), key_mask=torch.ones(2, 1).bool(), **cached(t5)),
            NotImplementedError,
            "key_mask: expected None with a cache, got a tensor",
        ),
        (
            lambda t5: T5(dataclasses.replace(CONFIG, activation="tanh")),
            ValueError,
            "activation: expected one of relu, gelu, gelu_tanh, silu, got 'tanh'",
        ),
    ],
    ids=["start", "target", "mask", "heads", "ids", "room", "batch", "cache-mask", "activation"],
)
def test_bad_input_is_one_clear_sentence(call, error, message):
    t5 = model()
    with torch.no_grad(), pytest.raises(error, match=f"^{message}$"):
        call(t5)


def test_a_cache_is_refused_where_gradients_are_recorded():
    t5 = model()
    with pytest.raises(ValueError, match="cache: expected a call without gradients"):
        t5.decode(ids(2, 1), **cached(t5))
