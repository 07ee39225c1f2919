"""attn_implementation="flashmark" gives what transformers' own eager attention gives."""

from __future__ import annotations

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from examples import huggingface as example  # noqa: E402
from flashmark.integrations import huggingface  # noqa: E402
from flashmark.integrations.huggingface.masks import LazyMask  # noqa: E402
from flashmark.masks import cache as cache_of_masks  # noqa: E402

pytestmark = pytest.mark.plain_empty  # transformers allocates buffers it never reads


@pytest.fixture(autouse=True, scope="module")
def registered():
    transformers.logging.set_verbosity_error()
    huggingface.register()


def build(name: str, dtype: torch.dtype = torch.float32):
    return example.build(name).to(dtype)


def both(model, call):
    """`call` with eager attention and with ours."""
    results = []
    for implementation in ("eager", "flashmark"):
        model.set_attn_implementation(implementation)
        results.append(call())
    return results


def assert_equal_models(model, call, tolerance: float = 1e-4):
    theirs, ours = both(model, call)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", example.PADDINGS)
@pytest.mark.parametrize("name", example.MODELS)
def test_logits_and_gradients(name, padding):
    model, given = build(name), example.inputs(padding)
    theirs = example.logits_and_gradients(model, "eager", given)
    ours = example.logits_and_gradients(model, "flashmark", given)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert example.difference(ours[key], theirs[key]) < 1e-4, key


@pytest.mark.parametrize("name", ["GPT-2", "T5"])  # the others round to float32 inside
def test_float64_to_rounding(name):
    model, given = build(name, torch.float64), example.inputs("left")
    theirs = example.logits_and_gradients(model, "eager", given)
    ours = example.logits_and_gradients(model, "flashmark", given)
    assert max(example.difference(ours[key], theirs[key]) for key in theirs) < 1e-11


@pytest.mark.parametrize("cache", example.CACHES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", example.MODELS)
def test_greedy_tokens(name, padding, cache):
    model, given = build(name), example.inputs(padding, length=12)
    theirs, ours = both(
        model, lambda: example.generate(model, model.config._attn_implementation, given, cache)
    )
    assert torch.equal(theirs, ours)


def test_it_is_our_attention_that_runs_and_no_mask_is_written_out(monkeypatch):
    calls, written = [], []
    module = importlib.import_module("flashmark.integrations.huggingface.attention")
    attend, write = module.block_sparse_attention, LazyMask._written_out
    monkeypatch.setattr(
        module, "block_sparse_attention", lambda *a, **k: calls.append(a[1]) or attend(*a, **k)
    )
    monkeypatch.setattr(LazyMask, "_written_out", lambda self: written.append(1) or write(self))
    model, given = example.build("Gemma-2"), example.inputs("left")
    example.logits_and_gradients(model, "flashmark", given)
    assert [key.shape[1] for key in calls] == [2, 2]  # grouped heads are not repeated
    assert not written


def test_padding_is_compiled_once_a_forward_and_read_anew_by_the_next(monkeypatch):
    compiled = []
    compile_mask = cache_of_masks.compile_mask

    def counted(*args, **kwargs):
        compiled.append(args[0])
        return compile_mask(*args, **kwargs)

    monkeypatch.setattr(cache_of_masks, "compile_mask", counted)
    model, given = build("Llama"), example.inputs("left")
    assert model.config.num_hidden_layers > 1
    model.set_attn_implementation("flashmark")
    with torch.no_grad():
        before = model(**given).logits
        assert len(compiled) == 1
        given["attention_mask"].data[:, :4] = 0  # in place, and no version counter tells
        after = model(**given).logits
        assert len(compiled) == 2
        model.set_attn_implementation("eager")
        expected = model(**given).logits
    last = (slice(None), -1)
    torch.testing.assert_close(after[last], expected[last], rtol=1e-4, atol=1e-4)
    assert (after[last] - before[last]).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma-2", "gpt-oss"])
def test_prefill_in_chunks(name, cache):
    """Several queries against a cache that already holds some keys."""
    model, given = build(name), example.inputs("left")

    def call():
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=40)
        else:
            past = transformers.DynamicCache(config=model.config)
        out, seen = [], 0
        for n in (10, 5, 1, 8):
            part = slice(seen, seen + n)
            seen += n
            mask = given["attention_mask"][:, :seen]
            ids = given["input_ids"][:, part]
            logits = model(input_ids=ids, attention_mask=mask, past_key_values=past).logits
            out.append(logits[given["attention_mask"][:, part].bool()])
        return torch.cat(out)

    with torch.no_grad():
        assert_equal_models(model, call)


@pytest.mark.parametrize("name", ["Llama", "Gemma-2"])
def test_packed_sequences(name):
    model, given = build(name), example.inputs("none")
    positions = torch.cat([torch.arange(n) for n in (9, 4, 11)]).expand(3, -1)

    def call():
        ids = given["input_ids"]
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    with torch.no_grad():
        assert_equal_models(model, call)
        alone = model(input_ids=given["input_ids"][:, 9:13]).logits
        torch.testing.assert_close(call()[:, 9:13], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "additive", "per-head"])
def test_masks_that_users_give(kind):
    model, given = build("Llama"), example.inputs("none")
    visible = torch.rand(3, 4 if kind == "per-head" else 1, 24, 24) < 0.5
    visible |= torch.eye(24, dtype=torch.bool)
    if kind != "bool":
        visible = torch.zeros(visible.shape, dtype=torch.float32).masked_fill(
            ~visible, torch.finfo(torch.float32).min
        )

    def call():
        mask = visible
        if kind == "bool" and model.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill(~mask, -1e38)
        return model(input_ids=given["input_ids"], attention_mask=mask).logits

    with torch.no_grad():
        assert_equal_models(model, call)


def test_chunked_attention_and_functions_of_users():
    from transformers import masking_utils

    model, given = build("Llama"), example.inputs("left")
    embeds = torch.zeros(3, 24, 32)
    model.config.attention_chunk_size = 7
    create = {
        "chunked": lambda: masking_utils.create_chunked_causal_mask(
            model.config, embeds, given["attention_mask"], past_key_values=None
        ),
        "or": lambda: masking_utils.create_causal_mask(
            model.config, embeds, given["attention_mask"], past_key_values=None,
            or_mask_function=lambda b, h, q, kv: (q < 5) & (kv < 5),
        ),
        "and": lambda: masking_utils.create_causal_mask(
            model.config, embeds, given["attention_mask"], past_key_values=None,
            and_mask_function=lambda b, h, q, kv: (q + kv) % 2 == 0,
        ),
        "blocks": lambda: masking_utils.create_causal_mask(
            model.config, embeds, given["attention_mask"], past_key_values=None,
            block_sequence_ids=torch.tensor([[0] * 9 + [-1] * 5 + [1] * 10]).expand(3, -1),
        ),
        "bidirectional": lambda: masking_utils.create_bidirectional_mask(
            model.config, embeds, given["attention_mask"]
        ),
    }  # fmt: skip
    for name, make in create.items():
        model.set_attn_implementation("eager")
        theirs = make()
        model.set_attn_implementation("flashmark")
        ours = make()
        assert torch.equal(ours + 0, theirs.expand(ours.shape)), name


def test_an_encoder_sees_both_sides():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=97,
    )  # fmt: skip
    model, given = transformers.BertModel(config).eval(), example.inputs("right")
    kept = given["attention_mask"].bool()
    with torch.no_grad():
        assert_equal_models(model, lambda: model(**given).last_hidden_state[kept])


def test_a_decoder_made_bidirectional():
    model, given = build("Llama"), example.inputs("right")
    model.config.is_causal = False
    kept = given["attention_mask"].bool()
    with torch.no_grad():
        assert_equal_models(model, lambda: model(**given, use_cache=False).logits[kept])


def test_models_that_ask_for_no_implementation_run_their_own():
    """Their attention adds the mask to its scores: it must hold numbers, not truth values."""
    config = transformers.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=97)
    given = example.inputs("left")
    model = transformers.BloomForCausalLM(config).eval()
    with torch.no_grad():
        wanted = model(**given).logits
        model.config._attn_implementation = "flashmark"
        assert torch.equal(model(**given).logits, wanted)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_changes_nothing():
    model, given = build("Gemma-2"), example.inputs("left")
    wanted = example.logits_and_gradients(model, "flashmark", given)
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = example.logits_and_gradients(model, "flashmark", given)
        for key in wanted:
            assert example.difference(found[key], wanted[key]) < 1e-9, key


def test_dropout_is_applied_in_training_only():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**example.SIZES, attention_dropout=0.5)
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation("flashmark")
    ids = example.inputs("none")["input_ids"]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["Llama", "gpt-oss"])
def test_bfloat16_is_as_close_to_float32_as_eager_is(name):
    given = example.inputs("left")
    kept = given["attention_mask"].bool()
    with torch.no_grad():
        exact = build(name)(**given).logits[kept]
        model = build(name, torch.bfloat16)
        theirs, ours = both(model, lambda: example.difference(model(**given).logits[kept], exact))
    assert ours <= 2 * theirs + 0.01


def test_compiled_models_need_no_graph_break():
    model, given = example.build("Llama"), example.inputs("left", length=16)
    model.set_attn_implementation("flashmark")
    kept = given["attention_mask"].bool()
    wanted = model(**given, use_cache=False).logits[kept]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**given, use_cache=False).logits[kept]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_decoding_with_a_static_cache():
    from torch._dynamo.utils import counters

    model, given = build("Llama"), example.inputs("left", length=12)
    wanted = example.generate(model, "eager", given, "dynamic")
    torch._dynamo.reset()
    counters.clear()
    compile_config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    model.set_attn_implementation("flashmark")
    tokens = model.generate(
        **given, max_new_tokens=12, do_sample=False, cache_implementation="static",
        compile_config=compile_config,
    )  # fmt: skip
    assert torch.equal(tokens, wanted)
    assert counters["stats"]["unique_graphs"] == 1  # of a step, whatever its position


def test_another_name():
    huggingface.register("landmark_and_exact")
    model, given = build("GPT-2"), example.inputs("left")
    wanted = example.logits_and_gradients(model, "flashmark", given)
    found = example.logits_and_gradients(model, "landmark_and_exact", given)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_is_not_supported_is_refused():
    model = build("Llama")
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        huggingface.attention(model, query, query, query, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="cache: expected no paged cache"):
        huggingface.attention(model, query, query, query, None, cache=object())


def test_other_implementations_stay_as_they_were():
    generic = transformers.utils.generic
    huggingface.register()
    ask = generic.is_flash_attention_requested
    assert ask(requested_attention_implementation="flash_attention_2")
    assert not ask(requested_attention_implementation="flashmark")
    assert not ask(requested_attention_implementation="sdpa")
