"""attn_implementation="flashmark_routed": each token of a causal layer chooses its key blocks."""

from __future__ import annotations

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from examples import huggingface as example  # noqa: E402
from examples import routed_model  # noqa: E402
from flashmark import masks, reference  # noqa: E402
from flashmark.integrations import huggingface  # noqa: E402

pytestmark = pytest.mark.plain_empty  # transformers allocates buffers it never reads

FEW = {"block_size": 4, "top_k": 1, "near": 0}


@pytest.fixture(autouse=True, scope="module")
def registered():
    transformers.logging.set_verbosity_error()
    huggingface.register()
    huggingface.register_routed("flashmark_routed_all", block_size=4, top_k=1000)
    huggingface.register_routed("flashmark_routed_few", **FEW)


def logits(model, implementation: str, given: dict):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("padding", example.PADDINGS)
@pytest.mark.parametrize("name", [x for x in example.MODELS if x != "T5"])  # it has a bias
def test_all_blocks_chosen_give_what_exact_attention_gives(name, padding):
    model, given = example.build(name), example.inputs(padding)
    theirs = example.logits_and_gradients(model, "flashmark", given)
    ours = example.logits_and_gradients(model, "flashmark_routed_all", given)
    for key in theirs:
        assert example.difference(ours[key], theirs[key]) < 1e-4, key


def test_few_blocks_give_what_the_reference_gives(monkeypatch):
    module = importlib.import_module("flashmark.integrations.huggingface.routed")
    model, given = example.build("Llama"), example.inputs("left")
    ours = logits(model, "flashmark_routed_few", given)
    exact = logits(model, "flashmark", given)
    calls = []

    def dense(*tensors, **options):
        calls.append(options)
        return reference.routed_attention(*tensors, **options)

    monkeypatch.setattr(module, "routed_attention", dense)
    expected = logits(model, "flashmark_routed_few", given)
    torch.testing.assert_close(ours[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert len(calls) == model.config.num_hidden_layers
    assert (ours - exact)[:, -1].abs().max() > 1e-4
    assert all(options[name] == value for options in calls for name, value in FEW.items())


@pytest.mark.parametrize("padding", ["none", "left"])
def test_greedy_tokens_with_a_dynamic_cache_are_those_without_one(padding):
    model, given = example.build("Llama"), example.inputs(padding, length=12)
    model.set_attn_implementation("flashmark_routed_few")
    found = [
        model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*found)


def test_layers_with_a_window_are_as_they_were(monkeypatch):
    module = importlib.import_module("flashmark.integrations.huggingface.routed")
    plain = module.routed_attention
    calls = []

    def counted(*tensors, **options):
        calls.append(options)
        return plain(*tensors, **options)

    monkeypatch.setattr(module, "routed_attention", counted)
    model = example.build("Gemma-2")
    logits(model, "flashmark_routed_few", example.inputs("none"))
    assert len(calls) == sum(kind == "full_attention" for kind in model.config.layer_types) == 1


def test_layers_of_landmark_attention_are_as_they_were():
    given = example.inputs("left", length=12)
    tokens = []
    for name in ("flashmark", "flashmark_routed_few"):
        torch.manual_seed(0)
        model = example.build("Llama")
        model.set_attn_implementation(name)
        huggingface.to_hybrid(model, landmarks=3, window=4)
        tokens.append(model.generate(**given, max_new_tokens=5, do_sample=False))
    assert torch.equal(*tokens)


def test_names_and_options_are_kept_apart():
    model, given = example.build("Llama"), example.inputs("none")
    few, all_blocks = (logits(model, f"flashmark_routed_{x}", given) for x in ("few", "all"))
    assert not torch.equal(few, all_blocks)
    huggingface.register()  # does not take back options that were set
    torch.testing.assert_close(logits(model, "flashmark_routed_few", given), few)


class Layer(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.5}, "dropout: expected 0 with routed attention, got 0.5"),
        ({"position_bias": torch.zeros(1, 2, 6, 6)}, "position_bias: expected None"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "attention_mask: expected causality and"),
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"cache": object()}, "cache: expected no paged cache"),
    ],
    ids=["dropout", "bias", "tensor-mask", "weights", "paged"],
)
def test_what_is_not_supported_is_refused(options, words):
    function = transformers.AttentionInterface()["flashmark_routed"]
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match=words):
        function(Layer(), query, query, query, **{"attention_mask": None} | options)


def test_the_table_of_the_page_is_that_of_the_measured_rows():
    path = routed_model.RESULTS / "routed-model-cpu.csv"
    assert routed_model.table(path) in routed_model.PAGE.read_text()


def test_a_mask_expression_runs_exactly():
    function = transformers.AttentionInterface()["flashmark_routed_few"]
    query, mask = torch.randn(1, 2, 30, 8), masks.causal() & masks.sliding_window(3)
    out, _ = function(Layer(), query, query, query, mask)
    expected, _ = huggingface.attention(Layer(), query, query, query, mask)
    assert torch.equal(out, expected)
