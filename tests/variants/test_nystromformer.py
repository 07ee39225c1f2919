"""The classic Nyströmformer computes what Hugging Face's model does with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flashmark import variants
from tests import helpers

transformers = pytest.importorskip("transformers")

LENGTH = 24


def model(*, inverse: str = "original", dtype=torch.float64, landmarks: int = 6, **changes):
    torch.manual_seed(0)
    config = transformers.NystromformerConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, segment_means_seq_len=LENGTH,
        num_landmarks=landmarks, conv_kernel_size=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.3, **changes,
    )  # fmt: skip
    theirs = transformers.NystromformerModel(config).to(dtype)
    for layer in theirs.encoder.layer:
        layer.attention.self.init_option = inverse
    return theirs


def tokens(batch: int = 3, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 50, (batch, length), generator=generator)


def outputs_and_gradients(model: nn.Module, run) -> dict[str, torch.Tensor]:
    out = run(model)
    d_out = helpers.randn(*out.shape, dtype=out.dtype, seed=7)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, parameters, d_out, materialize_grads=True, allow_unused=True)
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def assert_same(theirs: nn.Module, ours: nn.Module, run, forward: float, gradient: float) -> None:
    expected, found = outputs_and_gradients(theirs, run), outputs_and_gradients(ours, run)
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for name, x in expected.items() if name != "out")
    worst = {}
    for name, x in expected.items():
        scale = float(x.abs().max()) if name == "out" else max(float(x.abs().max()), largest / 100)
        worst[name] = float((found[name] - x).abs().max()) / scale
    print(f"output {worst.pop('out'):.1e}, worst gradient {max(worst.values()):.1e}")
    helpers.assert_close(found["out"], expected["out"], forward)
    assert max(worst.values()) <= gradient, max(worst, key=worst.get)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inverse", ["original", "exact"])
def test_outputs_and_gradients_of_the_converted_model(inverse, dtype):
    theirs = model(inverse=inverse, dtype=dtype)
    ours = variants.convert_nystromformer(copy.deepcopy(theirs))
    limits = (1e-5, 5e-5) if dtype == torch.float32 else (1e-12, 1e-11)
    assert_same(theirs, ours, lambda m: m(tokens()).last_hidden_state, *limits)


def test_as_many_landmarks_as_tokens_is_exact_attention():
    theirs = model(landmarks=LENGTH)
    ours = variants.convert_nystromformer(copy.deepcopy(theirs))
    for length in (LENGTH, 11):  # there they take any length
        ids = tokens(length=length)
        assert_same(theirs, ours, lambda m, ids=ids: m(ids).last_hidden_state, 1e-12, 1e-11)


def test_key_padding_of_a_layer():
    """At the layer, where theirs takes a mask over keys."""
    theirs = model().encoder.layer[0].attention.self
    ours = variants.convert_nystromformer(nn.ModuleList([copy.deepcopy(theirs)]))[0]
    hidden = helpers.randn(3, LENGTH, 32, dtype=torch.float64)
    visible = torch.rand(3, LENGTH) > 0.4
    added = torch.zeros(3, 1, 1, LENGTH, dtype=torch.float64)
    added = added.masked_fill(~visible[:, None, None], torch.finfo(torch.float64).min)
    assert_same(theirs, ours, lambda layer: layer(hidden, added)[0], 1e-12, 1e-11)
    helpers.assert_identical(
        ours(hidden, visible[:, None, None])[0], ours(hidden, added)[0], "a bool mask"
    )


def test_key_padding_of_a_model():
    """Padded tokens are no keys, and with pool_padding=False they do not matter at all."""
    converted = variants.convert_nystromformer(model(), inverse="exact")
    apart = variants.convert_nystromformer(model(), inverse="exact", pool_padding=False)
    ids, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.int64)
    mask[0, 15:] = 0
    changed = torch.where(mask.bool(), ids, 51 - ids)
    for m, same in ((converted, False), (apart, True)):
        one, two = (
            m(x, attention_mask=mask).last_hidden_state[mask.bool()] for x in (ids, changed)
        )
        assert torch.equal(one, two) == same
        assert not torch.equal(one, m(ids).last_hidden_state[mask.bool()])


def test_samples_are_coupled_only_where_the_published_start_is_asked_for():
    for inverse, coupled in (("original", True), ("exact", False), (None, True)):
        m = variants.convert_nystromformer(model(), inverse=inverse)
        both = m(tokens()).last_hidden_state
        alone = torch.cat([m(x[None]).last_hidden_state for x in tokens()])
        assert (helpers.relative_error(alone, both) > 1e-9) == coupled


@pytest.mark.parametrize("length", [1, 5, 13, 47])
def test_lengths_that_the_published_layer_cannot_take(length):
    m = variants.convert_nystromformer(model(), inverse="exact")
    ids = tokens(batch=2, length=length)
    out = m(ids).last_hidden_state
    assert out.shape == (2, length, 32) and out.isfinite().all()
    helpers.assert_close(m(ids[:1]).last_hidden_state, out[:1], 1e-12)


def test_weights_stay_the_same_parameters_under_the_same_names():
    theirs = model()
    before = dict(theirs.named_parameters())
    after = dict(variants.convert_nystromformer(theirs.eval()).named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    layer = theirs.encoder.layer[0].attention.self
    assert isinstance(layer, variants.NystromformerSelfAttention) and not layer.training
    fresh = variants.NystromformerSelfAttention(32, 4, 6, conv_kernel_size=5).double()
    fresh.load_state_dict(layer.state_dict())
    hidden = helpers.randn(2, LENGTH, 32, dtype=torch.float64)
    layer.inverse = "exact"
    helpers.assert_identical(fresh(hidden)[0], layer(hidden)[0])


def test_what_cannot_be_converted_or_computed_is_refused():
    with pytest.raises(ValueError, match="model: expected .*, got Linear"):
        variants.convert_nystromformer(nn.Linear(2, 2))
    layer = variants.NystromformerSelfAttention(32, 4, 6, conv_kernel_size=None)
    hidden = torch.zeros(1, 9, 32)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        layer(hidden, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask: expected .*, got"):
        layer(hidden, torch.ones(1, 9))
    for changes, name in (
        ({"embed_dim": 30}, "embed_dim"), ({"num_landmarks": 0}, "num_landmarks"),
        ({"conv_kernel_size": 4}, "conv_kernel_size"), ({"inverse": "qr"}, "inverse"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
            variants.NystromformerSelfAttention(**({"embed_dim": 32, "num_heads": 4} | changes))
