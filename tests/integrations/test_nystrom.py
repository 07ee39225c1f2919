"""to_nystrom: causal Nyström attention inside models of transformers."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from examples import huggingface as example  # noqa: E402
from flashmark import landmark_parameter_groups, reference  # noqa: E402
from flashmark.integrations import huggingface  # noqa: E402

pytestmark = pytest.mark.plain_empty


@pytest.fixture(params=["Llama", "GPT-2"])
def model(request):
    transformers.logging.set_verbosity_error()
    return huggingface.to_nystrom(example.build(request.param), landmarks=6)


def test_landmarks_are_parameters_and_nothing_else_changes_its_name(model):
    kind = "Llama" if "Llama" in type(model).__name__ else "GPT-2"
    before = set(dict(example.build(kind).named_parameters()))
    after = dict(model.named_parameters())
    new = {name: after[name] for name in after.keys() - before}
    assert before <= after.keys() and len(new) == 2
    kv_heads = 2 if kind == "Llama" else 4
    assert all(".landmarks." in n and p.shape == (kv_heads, 6, 8) for n, p in new.items())
    groups = landmark_parameter_groups(model, 0.1)
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in new.values()}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_every_layer_computes_the_reference(model, padding, monkeypatch):
    from flashmark.integrations.huggingface import converted as layer

    seen = []
    attend = layer.nystrom_attention

    def compare(query, key, value, landmarks, **options):
        out = attend(query, key, value, landmarks, **options)
        wanted = reference.nystrom_attention(
            query, key, value, landmarks, **options | {"core": None}
        )
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
        seen.append(options["key_mask"])
        return out

    monkeypatch.setattr(layer, "nystrom_attention", compare)
    given = example.inputs(padding)
    model(**given, use_cache=False)
    assert len(seen) == 2
    for mask in seen:
        if padding == "none":
            assert mask is None
        else:
            assert torch.equal(mask, given["attention_mask"].bool())


def test_gradients_reach_landmarks_and_never_the_future(model):
    ids = example.inputs("none")["input_ids"]
    model(ids, use_cache=False).logits.square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "landmarks" in n)
    changed = ids.clone()
    changed[:, 15:] = 5
    first, second = (model(x, use_cache=False).logits[:, :15] for x in (ids, changed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_with_a_state_and_without_a_cache(model, padding):
    given = example.inputs(padding, length=12)
    tokens = {cache: example.generate(model, "flashmark", given, cache) for cache in example.CACHES}
    assert torch.equal(tokens["dynamic"], tokens["none"])
    assert torch.equal(tokens["static"], tokens["none"])


def test_beam_search(model):
    given = example.inputs("left", length=12)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with_state = model.generate(**given, **options)
    assert torch.equal(with_state, model.generate(**given, **options, use_cache=False))


def test_the_cache_does_not_grow(model):
    given = example.inputs("none")
    with torch.no_grad():
        past = model(**given).past_key_values
        before = [layer.state.R.shape for layer in past.layers]
        model(input_ids=given["input_ids"], past_key_values=past)
    assert past.get_seq_length() == 48
    assert [layer.state.R.shape for layer in past.layers] == before
    assert all(layer.keys is None for layer in past.layers)


def test_some_layers_only():
    model = huggingface.to_nystrom(example.build("Llama"), landmarks=6, layers=[1])
    assert [hasattr(x.self_attn, "landmarks") for x in model.model.layers] == [False, True]
    given = example.inputs("left", length=12)
    tokens = [example.generate(model, "flashmark", given, cache) for cache in example.CACHES]
    assert all(torch.equal(tokens[0], x) for x in tokens[1:])


def test_a_copy_and_its_state_dict(model):
    given = example.inputs("none")
    wanted = model(**given).logits
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**given).logits, wanted)


def test_packed_sequences_are_refused(model):
    positions = torch.arange(12).repeat(2).expand(3, -1)
    with pytest.raises(NotImplementedError, match="attention_mask: expected causality"):
        model(example.inputs("none")["input_ids"], position_ids=positions, use_cache=False)
