"""Converted models of transformers: what they compute, kept in files, and refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from examples import huggingface as example  # noqa: E402
from flashmark.integrations import huggingface  # noqa: E402
from flashmark.integrations.huggingface.state import StateLayer, Tokens  # noqa: E402

pytestmark = pytest.mark.plain_empty

SIZES = example.SIZES | {"initializer_range": 0.3}
GPT_SIZES = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97,
    "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA_3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "part-rotary": ("GPTNeoX", {}),
    "rotary-outside": ("Phi", {}),
    "no-rotary-layer": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "interleaved": ("Cohere", {}),
    "gpt2": ("GPT2", None),
    "one-key-head": ("GPTBigCode", None),
}
ROTARY = [name for name, (_, options) in MODELS.items() if options is not None]
WINDOW = 4
KINDS = {
    "nystrom": lambda model: huggingface.to_nystrom(model, 5),
    "hybrid": lambda model: huggingface.to_hybrid(model, 5, window=WINDOW),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)


def build(name, **more):
    kind, options = MODELS[name]
    if options is None:
        config = getattr(transformers, f"{kind}Config")(**GPT_SIZES)
    else:
        config = getattr(transformers, f"{kind}Config")(**SIZES | options | more)
    end = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, kind + end)(config).eval()


def tokens(*shape):
    return torch.randint(2, 97, shape)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def landmarks(model):
    return {name: p for name, p in model.named_parameters() if "landmarks" in name}


def changed(model):
    """As after training: no parameter has its first value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def same_numbers(model, other):
    found, wanted = model.state_dict(), other.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def close(found, wanted, tolerance=2e-5):
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


# what is computed


@pytest.mark.parametrize("name", MODELS)
def test_hybrid_is_the_original_while_all_tokens_are_near(name):
    model, ids = build(name), tokens(2, 20)
    wanted = logits(model, ids)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    huggingface.to_hybrid(model, 5, window=13)
    assert close(logits(model, ids), wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)


@each_kind
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_models_see_distances_only(name, kind):
    model, ids = KINDS[kind](build(name)), tokens(2, 20)
    wanted = logits(model, ids)
    assert close(logits(model, ids, position_ids=torch.arange(20)[None] + 300), wanted)


@each_kind
@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(name, kind):
    model, ids = KINDS[kind](build(name)), tokens(2, 20)
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], 1)
    padded[1, 4:7] = ids[1, :3]
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert close(found[:1, 7:], logits(model, ids[:1]))
    assert close(found[1:, 4:], logits(model, padded[1:, 4:]))


@each_kind
@pytest.mark.parametrize("name", ["llama", "qwen2", "part-rotary", "gpt2", "one-key-head"])
def test_a_cache_changes_no_token(name, kind):
    model = KINDS[kind](build(name))
    padded = tokens(2, 12)
    padded[0, :5] = 0
    given = {"input_ids": padded, "attention_mask": (padded != 0).long(), "max_new_tokens": 9}
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        wanted = model.generate(**given, **options, use_cache=False)
        assert torch.equal(model.generate(**given, **options), wanted)
        static = model.generate(**given, **options, cache_implementation="static")
        assert torch.equal(static, wanted)


@each_kind
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_generation(name, kind):
    """As the assisted and as the assistant: tokens are taken back from the state."""
    model, ids = KINDS[kind](build(name)), tokens(1, 11)
    near, plain = changed(copy.deepcopy(model)), build(name)
    options = {"max_new_tokens": 16, "do_sample": False}
    wanted = model.generate(ids, **options)
    for assistant in (near, plain, copy.deepcopy(model)):
        assert torch.equal(model.generate(ids, **options, assistant_model=assistant), wanted)
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=3), wanted)
    by_model = plain.generate(ids, **options, assistant_model=model)
    assert torch.equal(by_model, plain.generate(ids, **options))


@each_kind
def test_tokens_taken_back_leave_no_trace(kind):
    model, ids = KINDS[kind](build("llama")), tokens(2, 30)
    cache = transformers.DynamicCache()
    cache.activate_past_recording()
    with torch.no_grad():
        for part in ids[:, :21].split([14, 1, 6], 1):
            model(part, past_key_values=cache)
        cache.crop(-9)  # from three calls
        assert cache.is_croppable and cache.get_seq_length() == 12
        model(tokens(2, 3), past_key_values=cache)
        cache.crop(-3)
        found = model(ids[:, 12:], past_key_values=cache).logits
    assert close(found, logits(model, ids)[:, 12:])


def test_a_cache_says_whether_tokens_can_be_taken_back():
    model = KINDS["nystrom"](build("llama"))
    cache = model(tokens(1, 12)).past_key_values
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="crop: expected a cache that records its past"):
        cache.crop(-1)
    cache.crop(0)
    cache.activate_past_recording()
    model(tokens(1, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="crop: expected at most the 2 tokens recorded"):
        cache.crop(-3)


def test_a_cache_keeps_the_core_that_it_began_with():
    model, ids = KINDS["nystrom"](build("llama")), tokens(1, 12)
    cache = model(ids).past_key_values
    cores = [layer.core for layer in cache.layers]
    model(ids, past_key_values=cache)
    assert all(layer.core is core for layer, core in zip(cache.layers, cores, strict=True))
    cache.reset()
    assert all(layer.core is None and layer.state is None for layer in cache.layers)


def test_states_of_chosen_samples():
    layer = StateLayer(record_past=True)
    key = torch.arange(3.0).view(3, 1, 1, 1)
    layer.update(key, key)
    layer.consume(Tokens(key, key, None), lambda tokens, state, keep: (key, (tokens.key * 2,)))
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert layer.state[0].flatten().tolist() == [4, 4, 0]
    layer.batch_repeat_interleave(2)
    assert layer.state[0].flatten().tolist() == [4, 4, 4, 4, 0, 0]
    layer.crop(-1)
    seen = []
    layer.consume(Tokens(key, key, None), lambda tokens, state, keep: (key, seen.append(state)))
    assert seen == [None]


# kept


@each_kind
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name, kind, tmp_path):
    model, ids = changed(KINDS[kind](build(name))), tokens(2, 20)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["flashmark_attention"]
    expected = {"kind": kind, "landmarks": 5, "layers": [0, 1]}
    assert record == [expected | ({"window": WINDOW} if kind == "hybrid" else {})]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(landmarks(again)) == 2 and same_numbers(again, model)
    assert close(logits(again, ids), logits(model, ids))
    if name == "tied":
        assert again.lm_head.weight is again.model.embed_tokens.weight
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_layers_converted_in_two_ways(tmp_path):
    model, ids = build("llama", num_hidden_layers=3), tokens(2, 20)
    huggingface.to_nystrom(model, 5, layers=[2])
    huggingface.to_hybrid(model, 3, window=WINDOW, layers=[0])
    changed(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert [p.shape[1] for p in landmarks(again).values()] == [3, 5]
    assert same_numbers(again, model) and close(logits(again, ids), logits(model, ids))
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **options, use_cache=False)
    assert torch.equal(again.generate(ids, **options), wanted)


def test_a_new_process_needs_register(tmp_path):
    """It loads the model after `register`, and is told so without it."""
    model = changed(KINDS["hybrid"](build("llama")))
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, transformers\n"
        "transformers.logging.set_verbosity_error()\n"
        "try:\n"
        "    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    assert 'flashmark' in str(error)\n"
        "else:\n"
        "    raise AssertionError('loaded without landmarks')\n"
        "from flashmark.integrations import huggingface\n"
        "huggingface.register()\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(float(model(torch.arange(2, 22)[None]).logits.double().sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = logits(model, torch.arange(2, 22)[None]).double().sum()
    assert float(done.stdout.split()[-1]) == pytest.approx(float(wanted), abs=1e-3)


def test_landmarks_that_a_checkpoint_lacks_are_initialised(tmp_path):
    build("llama").save_pretrained(tmp_path)
    converted = KINDS["nystrom"](build("llama"))
    model = type(converted).from_pretrained(tmp_path, config=converted.config)
    found, wanted = landmarks(model), landmarks(converted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_configuration_alone_makes_a_converted_model():
    model = KINDS["hybrid"](build("llama"))
    again = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    again.load_state_dict(model.state_dict())
    ids = tokens(2, 20)
    assert close(logits(again.eval(), ids), logits(model, ids))


def test_a_part_of_a_larger_model(tmp_path):
    text = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text["rope_parameters"]["mrope_section"] = [1, 1, 2]
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model, ids = transformers.Qwen2VLForConditionalGeneration(config).eval(), tokens(1, 20)
    wanted = logits(model, ids)
    assert close(logits(huggingface.to_hybrid(model, 5, window=10), ids), wanted)
    changed(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert same_numbers(again, model) and close(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_landmarks_have_the_type_that_is_computed_in(stored, computed):
    model = build("llama").to(computed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().to(stored)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    KINDS["nystrom"](model)
    assert all(p.dtype == computed and p.requires_grad for p in landmarks(model).values())


# refused


def test_a_second_conversion_is_refused_and_changes_nothing():
    model, ids = changed(KINDS["nystrom"](build("llama"))), tokens(2, 20)
    wanted, config = logits(model, ids), model.config.to_dict()
    for convert in KINDS.values():
        with pytest.raises(ValueError, match="layers: expected layers with attention of their own"):
            convert(model)
    assert torch.equal(logits(model, ids), wanted) and model.config.to_dict() == config


@pytest.mark.parametrize(
    ("layers", "error"),
    [([2], ValueError), ([-1], ValueError), ([], ValueError), (1, TypeError), ([0.5], TypeError)],
    ids=str,
)
def test_layers_that_the_model_does_not_have(layers, error):
    model = build("llama")
    with pytest.raises(error, match="layers: expected"):
        huggingface.to_nystrom(model, 5, layers=layers)
    assert not landmarks(model) and not hasattr(model.config, "flashmark_attention")


@pytest.mark.parametrize("count", [0, 257, 4.0, True])
def test_a_number_of_landmarks_out_of_range(count):
    with pytest.raises(ValueError, match="landmarks: expected an int from 1 to 256"):
        huggingface.to_nystrom(build("llama"), count)


@pytest.mark.parametrize("window", [0, 2.0, None])
def test_a_window_out_of_range(window):
    with pytest.raises((ValueError, TypeError), match="window: expected an int >= 1"):
        huggingface.to_hybrid(build("llama"), 5, window=window)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_implementation(name, tmp_path):
    model = KINDS["nystrom"](build("llama"))
    with pytest.raises(ValueError, match="attn_implementation: expected 'flashmark'"):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation: expected 'flashmark'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match="attn_implementation: expected 'flashmark'"):
        model(tokens(1, 5))


SLIDING = {"sliding_window": 6}
REFUSED = {
    "sliding": (lambda: build("mistral", **SLIDING), "full attention, got a sliding window of 6"),
    "sliding-layers": (
        lambda: build("qwen2", use_sliding_window=True, max_window_layers=1, **SLIDING),
        r"got sliding_attention in layer 1 \(layers that can be converted: \[0\]\)",
    ),
    "softcap": (lambda: example.build("Gemma-2"), "full attention"),
    "sinks": (lambda: example.build("gpt-oss"), "full attention"),
    "own-rotary": (
        lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=97, rotary_dim=4)
        ),
        "position_embeddings, got its own",
    ),
}


@each_kind
@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_landmarks_cannot_replace(name, kind):
    make, words = REFUSED[name]
    model = make()
    with pytest.raises(NotImplementedError, match=words):
        KINDS[kind](model)
    assert not landmarks(model)


@pytest.mark.parametrize("name", ["Gemma-2", "gpt-oss"])
def test_full_layers_with_a_softcap_or_sinks(name):
    with pytest.raises(NotImplementedError, match="no softcap|no attention sinks"):
        huggingface.to_nystrom(example.build(name), 5, layers=[1])


def test_the_full_layers_of_a_model_with_windows():
    model = build("qwen2", use_sliding_window=True, max_window_layers=1, **SLIDING)
    huggingface.to_hybrid(model, 5, window=WINDOW, layers=[0])
    ids, options = tokens(2, 12), {"max_new_tokens": 9, "do_sample": False}
    wanted = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), wanted)


@pytest.mark.parametrize("make", [lambda: example.build("T5"), lambda: torch.nn.Linear(2, 2)])
def test_models_without_such_attention(make):
    with pytest.raises(ValueError, match="model: expected causal attention modules"):
        huggingface.to_nystrom(make())


def test_heads_too_wide_for_a_second_rotary_part():
    model = huggingface.to_hybrid(build("llama", head_dim=130), 5, window=WINDOW)
    with pytest.raises(NotImplementedError, match=r"head_dim: expected at most 256.*130 \+ 130"):
        model(tokens(1, 4))


def test_landmarks_lost_in_loading_are_missed():
    """The configuration of a converted model on one that was built without looking at it."""
    model = build("llama")
    model.config.flashmark_attention = KINDS["nystrom"](build("llama")).config.flashmark_attention
    with pytest.raises(ValueError, match="got none: call register"):
        huggingface.to_nystrom(model, 5)
