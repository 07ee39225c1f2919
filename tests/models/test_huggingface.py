"""Equal weights give the numbers of Hugging Face's T5, GPT-2 and Llama."""

from __future__ import annotations

import pytest
import torch

from flashmark.generation import generate
from flashmark.models import from_huggingface
from flashmark.models.convert import converted
from flashmark.objectives import IGNORED, token_loss
from tests import helpers

transformers = pytest.importorskip("transformers")

VOCABULARY = 61


def t5(**options):
    config = transformers.T5Config(**{
        "vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2,
        "num_decoder_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20, "dropout_rate": 0.1, "decoder_start_token_id": 0,
        "initializer_factor": 1.0,
    } | options)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def gpt2(**options):
    config = transformers.GPT2Config(**{
        "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1,
    } | options)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    config = transformers.LlamaConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.2, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "bos_token_id": 1, "eos_token_id": 1,
    } | options)  # fmt: skip
    return transformers.LlamaForCausalLM(config)


T5S = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
DECODERS = {
    "gpt2": (gpt2, {}),
    "gpt2-untied": (gpt2, {"tie_word_embeddings": False}),
    "llama": (llama, {}),
    "llama-tied-wide-heads": (llama, {"tie_word_embeddings": True, "head_dim": 10}),
}


def pair(make, **options):
    """A Hugging Face model with random weights, norms included, and ours with the same."""
    torch.manual_seed(0)
    theirs = make(**options).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return theirs, from_huggingface(theirs)


def ids(*shape, seed=1):
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths, width, side="right"):
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return mask if side == "right" else mask.flip(1)


def assert_same_gradients(ours, theirs, kind):
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = converted(kind, gradients)
    actual = dict(ours.named_parameters())
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        helpers.assert_close(actual[name].grad, gradient, 5e-5, name)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("version", T5S)
def test_t5_loss_logits_and_gradients(version, side):
    theirs, ours = pair(t5, **T5S[version])
    source, labels = ids(3, 37), ids(3, 29, seed=2)
    mask = None if side == "none" else padding([37, 20, 3], 37, side)
    labels[1, 20:] = IGNORED
    expected = theirs(
        input_ids=source, labels=labels, attention_mask=None if mask is None else mask.long()
    )
    actual = ours(source, labels=labels, key_mask=mask)
    helpers.assert_close(actual.logits, expected.logits, 1e-5)
    helpers.assert_close(actual.loss, expected.loss, 1e-5)
    helpers.assert_close(
        actual.encoded if mask is None else actual.encoded[mask],
        expected.encoder_last_hidden_state
        if mask is None
        else expected.encoder_last_hidden_state[mask],
        1e-5,
    )
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(ours, theirs, "t5")


def test_t5_decoder_padding():
    theirs, ours = pair(t5)
    source, target = ids(2, 11), ids(2, 13, seed=2)
    mask = padding([13, 6], 13)
    expected = theirs(
        input_ids=source, decoder_input_ids=target, decoder_attention_mask=mask.long()
    ).logits
    actual = ours(source, target, decoder_key_mask=mask).logits
    helpers.assert_close(actual[mask], expected[mask], 1e-5)


def test_t5_greedy_generation():
    theirs, ours = pair(t5, num_decoder_layers=2)  # their cache wants as many as the encoder has
    source, mask = ids(3, 17), padding([17, 9, 2], 17)
    expected = theirs.generate(
        source, attention_mask=mask.long(), max_new_tokens=20, do_sample=False, num_beams=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    given = ours.given(source, key_mask=mask)
    actual = generate(given, torch.zeros(3, 1, dtype=torch.long), 20)
    assert torch.equal(actual, expected[:, 1:])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_logits_and_gradients(name):
    make, options = DECODERS[name]
    theirs, ours = pair(make, **options)
    tokens = ids(3, 50)
    expected, actual = theirs(tokens).logits, ours(tokens)
    helpers.assert_close(actual, expected, 1e-5)
    targets = torch.cat([tokens[:, 1:], torch.full((3, 1), IGNORED)], 1)
    token_loss(expected, targets).backward()
    token_loss(actual, targets).backward()
    assert_same_gradients(ours, theirs, name.split("-")[0])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoder_left_padding(name):
    make, options = DECODERS[name]
    theirs, ours = pair(make, **options)
    tokens, mask = ids(3, 20), padding([20, 13, 1], 20, "left")
    places = (mask.long().cumsum(1) - 1).clamp_min(0)
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=places).logits
    helpers.assert_close(ours(tokens, key_mask=mask)[mask], expected[mask], 1e-5)


@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoder_greedy_generation_of_a_padded_batch(name, chunk):
    make, options = DECODERS[name]
    theirs, ours = pair(make, **options)
    tokens, mask = ids(3, 20), padding([20, 13, 4], 20, "left")
    expected = theirs.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=24, do_sample=False, num_beams=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(generate(ours, tokens, 24, key_mask=mask, chunk=chunk), expected[:, 20:])


def test_conversion_keeps_dtype_and_takes_our_options():
    torch.manual_seed(0)
    theirs = llama().bfloat16().train()
    ours = from_huggingface(theirs, attention=["hybrid", "nystrom"], landmarks=4, convolution=3)
    assert ours.training and {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours(ids(1, 9)).shape == (1, 9, VOCABULARY)


@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_a_hybrid_llama_is_the_llama_while_all_tokens_are_near(padding):
    theirs, tokens = llama().eval(), ids(2, 40)
    ours = from_huggingface(theirs, attention="hybrid", window=20, landmarks=4)
    mask = torch.ones(2, 40, dtype=torch.bool)
    if padding:
        mask[1, :9] = False
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    helpers.assert_close(ours(tokens, key_mask=mask)[mask], expected[mask], 1e-4)
    far = from_huggingface(theirs, attention="hybrid", window=4, landmarks=4)(tokens)
    assert far.isfinite().all()


def test_a_hybrid_that_cannot_keep_the_rotation_is_refused():
    with pytest.raises(NotImplementedError, match="rotary_dim: expected less than head_dim 6"):
        from_huggingface(llama(), attention="hybrid", merge="gate")
    ours = from_huggingface(llama(), attention="hybrid", merge="gate", rotary_dim=2, landmarks=4)
    assert ours(ids(1, 9)).isfinite().all()


def test_t5_in_float16_keeps_the_dtype_of_each_weight():
    theirs = t5().half()
    theirs.encoder.block[0].layer[-1].DenseReluDense.wo.float()
    ours = from_huggingface(theirs)
    assert ours.encoder.layers[0].mlp.down.weight.dtype == torch.float32
    assert ours.encoder.layers[1].mlp.down.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: llama(
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            ),
            NotImplementedError,
            "model: expected rope_type='default' in its config, got 'linear'",
        ),
        (
            lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
            NotImplementedError,
            "model: expected scale_attn_by_inverse_layer_idx=False in its config, got True",
        ),
        (
            lambda: transformers.BertModel(
                transformers.BertConfig(
                    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=8,
                )
            ),
            NotImplementedError,
            "model: expected a t5, gpt2 or llama model, got bert",
        ),
    ],
    ids=["rope", "scale", "kind"],
)  # fmt: skip
def test_what_is_not_known_is_refused(make, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        from_huggingface(make())
