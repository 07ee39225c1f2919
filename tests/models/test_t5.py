"""T5: decoding step by step, masks of heads and padding, relative positions, bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from flashmark import masks
from flashmark.generation import generate, predict_in_parallel
from flashmark.models import T5, T5Config
from flashmark.models.t5_layers import RelativeBias
from flashmark.objectives import IGNORED, token_loss
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


@pytest.mark.parametrize("chunk", [1, 4], ids=["steps", "chunks"])
@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["full", "right", "left"])
def test_one_teacher_forced_forward_equals_decoding_in_steps(mask, chunk):
    t5, source, target = model(), ids(3, 13), ids(3, 18, seed=2)
    expected = t5(source, target, key_mask=mask).logits
    given = t5.given(source, key_mask=mask)
    cache = given.init_cache(3, 18)
    with torch.no_grad():
        steps = [given(part, cache=cache) for part in target.split(chunk, dim=1)]
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_decoder_prompts_are_as_if_not_padded(side):
    t5, source, prompts, more = model(), ids(3, 9), ids(3, 13, seed=2), ids(3, 4, seed=3)
    key_mask = MASK if side == "right" else MASK.flip(1)
    given = t5.given(source)
    whole = t5.decode(prompts, given.encoded, key_mask=key_mask)
    cache = given.init_cache(3, 17)
    with torch.no_grad():
        parts = zip(prompts.split(5, 1), key_mask.split(5, 1), strict=True)
        read = torch.cat([given(x, key_mask=m, cache=cache) for x, m in parts], 1)
        after = given(more, cache=cache)
    assert cache.length.tolist() == [17, 9, 5]
    for row in range(3):
        own = torch.cat([prompts[row, key_mask[row]], more[row]])[None]
        expected = t5(source[row : row + 1], own).logits[0]
        helpers.assert_close(whole[row, key_mask[row]], expected[:-4], 1e-5)
        helpers.assert_close(read[row, key_mask[row]], expected[:-4], 1e-5)
        helpers.assert_close(after[row], expected[-4:], 1e-5)


def test_a_second_turn_of_a_decoder_goes_on_from_the_first():
    t5, source, start = model(), ids(2, 9), torch.zeros(2, 1, dtype=torch.long)
    given = t5.given(source)
    end = int(generate(given, start, 3)[0, 1])
    cache = given.init_cache(2, 40)
    first = generate(given, start, 8, end_token=end, cache=cache)
    for row in range(2):
        alone = generate(t5.given(source[row : row + 1]), start[:1], 8, end_token=end)[0]
        assert torch.equal(first[row, : len(alone)], alone)
        assert int(cache.length[row]) == len(alone)


def test_tokens_taken_back_are_as_if_never_decoded():
    t5, source, target = model(), ids(3, 9), ids(3, 12, seed=2)
    given = t5.given(source, key_mask=torch.ones(3, 9).bool())
    cache = given.init_cache(3, 20)
    with torch.no_grad():
        given(target, cache=cache)
        cache.crop(torch.tensor([12, 7, 0]))
        cache.select(torch.tensor([1, 1, 0]))
        out = given(target[:, :3], cache=cache)
    for place, (row, n) in enumerate([(1, 7), (1, 7), (0, 12)]):
        own = torch.cat([target[row, :n], target[place, :3]])[None]
        expected = t5(source[row : row + 1], own).logits[0, n:]
        helpers.assert_close(out[place], expected, 1e-5)


@pytest.mark.parametrize("in_the_config", [True, False], ids=["config", "call"])
def test_the_decoder_shows_what_its_mask_shows(in_the_config):
    mask = masks.causal() & masks.pinned(2)
    t5, source, prefix, places = model(mask=mask), ids(2, 9), ids(2, 2), ids(2, 6, seed=2)
    given = t5.given(source)
    options = {}
    if not in_the_config:
        t5, options = model(), {"mask": mask}
        given = t5.given(source)
    together = predict_in_parallel(given, prefix, places, **options)
    others = places.clone()
    others[:, 0] = (others[:, 0] + 1) % 41
    moved = predict_in_parallel(given, prefix, others, **options)
    helpers.assert_identical(moved[:, 1:], together[:, 1:])
    assert not torch.equal(moved[:, 0], together[:, 0])
    if in_the_config:
        cache = given.init_cache(2, 8)
        with torch.no_grad():
            steps = [given(x, cache=cache) for x in torch.cat([prefix, places], 1).split(1, 1)]
        helpers.assert_close(torch.cat(steps[2:], 1), together, 1e-5)


def test_embeddings_in_the_place_of_tokens():
    t5, source, target = model(), ids(2, 9), ids(2, 7, seed=2)
    encoded = t5.encode(source)
    embeds = t5.embed(target)
    out = t5.decode(None, encoded, inputs_embeds=embeds)
    helpers.assert_identical(out, t5.decode(target, encoded))


@pytest.mark.parametrize("sizes", [(0, 3), (4, 0), (0, 0)], ids=["source", "target", "both"])
def test_an_empty_source_or_target(sizes):
    t5, (source, target) = model(), (ids(2, n) for n in sizes)
    logits = t5(source, target).logits
    assert logits.shape == (2, sizes[1], 41) and logits.isfinite().all()
    hidden = t5(ids(2, 4), target, key_mask=torch.zeros(2, 4).bool()).logits
    if not sizes[0]:  # nothing to read is like a source that is all hidden
        helpers.assert_close(logits, hidden, 1e-6)
    logits.sum().backward()


def test_labels_without_a_padding_token():
    t5, source, labels = model(padding_token=None), ids(2, 5), ids(2, 4, seed=2)
    helpers.assert_identical(
        t5(source, labels=labels).loss, token_loss(t5(source, labels=labels).logits, labels)
    )
    labels[1, 1:] = IGNORED
    with pytest.raises(ValueError, match="padding_token: expected a token id in the place of IGN"):
        t5(source, labels=labels)


@torch.no_grad()
def test_float16_where_the_feed_forward_part_overflows():
    t5, source, labels = model(), ids(2, 9), ids(2, 7, seed=2)
    for stack in (t5.encoder, t5.decoder):
        stack.layers[1].mlp.up.weight.mul_(40)
        stack.layers[1].mlp.down.weight.mul_(2000)
    expected = t5(source, labels=labels).loss
    widest = []
    t5.encoder.layers[1].mlp.register_forward_hook(lambda m, x, y: widest.append(y.abs().max()))
    loss = t5.half()(source, labels=labels).loss
    assert widest[0] > torch.finfo(torch.float16).max
    assert (loss - expected).abs() < 0.02 * expected


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
            lambda t5: t5.decode(ids(2, 1), mask=masks.causal(), **cached(t5)),
            ValueError,
            "mask: expected None with a cache, which has its own, got a mask",
        ),
        (
            lambda t5: t5.decode(None, t5.encode(ids(2, 5))),
            ValueError,
            "decoder_input_ids: expected token ids or inputs_embeds, got neither",
        ),
        (
            lambda t5: T5(dataclasses.replace(CONFIG, activation="tanh")),
            ValueError,
            "activation: expected one of relu, gelu, gelu_tanh, silu, got 'tanh'",
        ),
    ],
    ids=[
        "start",
        "target",
        "mask",
        "heads",
        "ids",
        "room",
        "batch",
        "cache-mask",
        "nothing",
        "activation",
    ],
)
def test_bad_input_is_one_clear_sentence(call, error, message):
    t5 = model()
    with torch.no_grad(), pytest.raises(error, match=f"^{message}$"):
        call(t5)


def test_a_cache_is_refused_where_gradients_are_recorded():
    t5 = model()
    with pytest.raises(ValueError, match="cache: expected a call without gradients"):
        t5.decode(ids(2, 1), **cached(t5))
