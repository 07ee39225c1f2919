"""Decoders with routed attention: the weights of exact ones, and landmarks that learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import masks
from flashmark.models import (
    Decoder,
    DecoderConfig,
    from_huggingface,
    record_routing,
    routing_losses,
    to_routed,
)
from flashmark.nn import RoutedAttention
from flashmark.objectives import token_loss
from tests import helpers
from tests.models.test_decoder import CONFIG, ids, model

SIZES = {"block_size": 4, "top_k": 2}


@pytest.mark.parametrize("landmarks", [None, 3])
def test_a_copy_that_chooses_all_blocks_computes_what_the_model_does(landmarks):
    exact, tokens = model(), ids(2, 40)
    before = {name: x.clone() for name, x in exact.state_dict().items()}
    routed = to_routed(exact, landmarks=landmarks, block_size=4, top_k=10)
    helpers.assert_close(routed(tokens), exact(tokens), 1e-5)
    few = to_routed(exact, landmarks=landmarks, block_size=4, top_k=1, near=0)
    assert (few(tokens) - exact(tokens)).abs().max() > 1e-3
    for parameter in few.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[name], x) for name, x in exact.state_dict().items())


def test_layers_of_other_kinds_stay_as_they_are():
    exact = model(attention=("exact", "hybrid")).double()
    routed = to_routed(exact, block_size=4, top_k=100)
    assert routed.config.attention == ("routed", "hybrid")
    assert [type(layer.attention) is RoutedAttention for layer in routed.layers] == [True, False]
    assert not routed.training and routed.embed.weight.dtype == torch.float64
    helpers.assert_close(routed(ids(1, 30)), exact(ids(1, 30)), 1e-12)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "model: expected a Decoder, got Linear"),
        (lambda: model(attention="nystrom"), ValueError, "got attention='nystrom', mask=None"),
        (
            lambda: model(mask=masks.causal() & masks.sliding_window(3)),
            ValueError,
            "model: expected layers of exact causal attention",
        ),
    ],
    ids=["no-decoder", "no-exact-layer", "a-mask"],
)
def test_what_cannot_be_routed(make, error, words):
    with pytest.raises(error, match=words):
        to_routed(make())


def test_routing_losses_train_landmarks_through_the_model():
    decoder, tokens = model(attention="routed", **SIZES).train(), ids(2, 41)
    assert routing_losses(decoder).item() == 0.0  # nothing is recorded
    record_routing(decoder)
    loss = token_loss(decoder(tokens[:, :-1]), tokens[:, 1:])
    router = routing_losses(decoder)
    assert router.item() > 0.0
    (loss + router).backward()
    found = [layer.attention.landmarks.grad for layer in decoder.layers]
    assert all(grad.any() for grad in found)
    record_routing(decoder, False)
    assert all(layer.attention.routing is None for layer in decoder.layers)
    decoder(tokens)
    assert routing_losses(decoder).item() == 0.0


def test_landmarks_learn_when_activations_are_recomputed():
    decoder, tokens = model(attention="routed", **SIZES).train(), ids(2, 41)
    record_routing(decoder)
    gradients = []
    for decoder.recompute in (False, True):
        decoder.zero_grad()
        loss = token_loss(decoder(tokens[:, :-1]), tokens[:, 1:])
        (loss + routing_losses(decoder)).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    for plain, again in zip(*gradients, strict=True):
        helpers.assert_close(again, plain, 1e-6)


def test_the_config_reaches_every_layer():
    options = {"block_size": 8, "top_k": 3, "near": 2, "block_landmarks": 5}
    config = dataclasses.replace(CONFIG, attention="routed", **options)
    for layer in Decoder(config).layers:
        attention = layer.attention
        assert (attention.block_size, attention.top_k, attention.near) == (8, 3, 2)
        assert attention.landmarks.shape == (2, 5, 4) and attention.rotary == config.rotary_theta
    assert DecoderConfig(9, attention="routed").block_landmarks == 4


def test_a_llama_with_all_blocks_chosen_keeps_its_logits():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    options = {"attention": "routed", "block_size": 4, "top_k": 20, "block_landmarks": 3}
    ours = from_huggingface(theirs, **options)
    with torch.no_grad():
        helpers.assert_close(ours(ids(2, 30)), theirs(ids(2, 30)).logits, 1e-4)
