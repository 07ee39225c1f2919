"""One probe for every attention of the package: those said to be causal pass it, and leaks fail."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import flashmark
from examples.leaky import leaky_segment_attention
from flashmark import check_causality, masks, variants
from tests import helpers
from tests.nystrom.cases import BACKENDS
from tests.variants.cases import BIDIRECTIONAL, CAUSAL

pytestmark = pytest.mark.filterwarnings("ignore:untied landmarks")

N = 50
LANDMARKS = flashmark.init_landmarks(2, 6, 16, generator=torch.Generator().manual_seed(0))


def inputs(n: int = N) -> dict[str, torch.Tensor]:
    names = "query", "key", "value"
    return dict(zip(names, helpers.qkv(2, 4, n, 16, kv_heads=2, v_dim=5, grad=False), strict=True))


OPERATORS = {
    "exact": functools.partial(flashmark.block_sparse_attention, mask=masks.causal()),
    "window": functools.partial(
        flashmark.block_sparse_attention, mask=masks.causal() & masks.sliding_window(20)
    ),
    "nystrom": functools.partial(flashmark.nystrom_attention, landmarks=LANDMARKS),
    "hybrid-slots": functools.partial(
        flashmark.hybrid_attention, landmarks=LANDMARKS, window=16, merge="slots"
    ),
    "hybrid-mass": functools.partial(
        flashmark.hybrid_attention, landmarks=LANDMARKS, window=16, merge="mass"
    ),
    "hybrid-gate": functools.partial(
        flashmark.hybrid_attention, landmarks=LANDMARKS, window=16, merge="gate",
        gate=torch.full((1, 4, 1, 1), 0.3),
    ),
    "target": lambda **x: variants.target_attention(**x, landmarks=LANDMARKS),
} | {name: member.bound(2, N, 2) for name, member in CAUSAL.items()}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_causal_attention_keeps_every_bit_of_the_past(name, backend):
    op = functools.partial(OPERATORS[name], backend=backend)
    report = check_causality(op, positions=(3, 15, 34), **inputs())
    assert report, report
    assert report.probes == 3 * (4 + 4 + 2 + 3)


@pytest.mark.parametrize("segment", [1, 16])
@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_segment_attention_at_the_edges_of_segments_and_with_steep_scores(segment, factor):
    """A substitution may overflow only after the landmarks that rows could read."""
    tensors = inputs()
    tensors["key"] *= factor
    op = functools.partial(variants.segment_attention, segment=segment)
    edges = (segment - 1, segment, 2 * segment)
    report = check_causality(op, positions=edges, **tensors)
    assert report, report


LEAKS = {name: member.bound(2, N, 2) for name, member in BIDIRECTIONAL.items()} | {
    f"segment-means-{count}": functools.partial(leaky_segment_attention, num_landmarks=count)
    for count in (8, 9)
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_found(name):
    op = LEAKS[name]
    report = check_causality(op, positions=(7, 26), **inputs())
    assert not report
    assert {leak.input for leak in report.leaks} >= {"key", "value"}
    assert "gradient" in {leak.poison for leak in report.leaks}
    assert str(report).startswith("NOT CAUSAL") and "value" in str(report)


def test_the_convolution_residual_is_causal_when_one_sided():
    weight = helpers.randn(2, 5)
    residual = functools.partial(variants.convolution_residual, weight=weight)
    value = {"value": inputs()["value"]}
    assert check_causality(functools.partial(residual, is_causal=True), **value)
    assert not check_causality(residual, **value)


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Row i holds row i + by."""
    return torch.roll(x, -by, dims=-2)


@pytest.mark.parametrize("by", [1, -N + 2])
def test_one_late_token_is_enough(by):
    report = check_causality(lambda value: shifted(value, by), value=inputs()["value"])
    assert not report


def test_a_leak_in_the_gradient_alone_is_found():
    class Straight(torch.autograd.Function):  # past outputs keep their bits, gradients do not
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout.flip(-2)

    report = check_causality(lambda value: Straight.apply(value), value=inputs()["value"])
    assert {leak.poison for leak in report.leaks} == {"gradient"}
    assert check_causality(
        lambda value: Straight.apply(value), value=inputs()["value"], gradients=False
    )


class Model(nn.Module):
    """Tokens (B, N) to logits (B, N, 11), or hidden states (B, N, 8) to (B, N, 8)."""

    def __init__(self, mask):
        super().__init__()
        self.embed, self.project, self.head = (
            nn.Embedding(11, 8),
            nn.Linear(8, 24),
            nn.Linear(8, 11),
        )
        self.mask = mask

    def mix(self, x):
        qkv = self.project(x).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        return flashmark.block_sparse_attention(*qkv, self.mask).squeeze(1)

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)))


def test_models_and_layers_are_probed_by_tokens_and_by_hidden_states():
    tokens = torch.randint(11, (2, 30))
    for mask, causal in ((masks.causal(), True), (masks.sliding_window(3, 1), False)):
        model = Model(mask).eval()
        assert check_causality(model, tokens=tokens).ok == causal
        assert check_causality(model.mix, x=torch.randn(2, 30, 8)).ok == causal


def test_positions_may_be_chosen():
    report = check_causality(OPERATORS["exact"], positions=[3], gradients=False, **inputs())
    assert report.probes == 4 + 4 + 2
    leaky = functools.partial(leaky_segment_attention, num_landmarks=N // 2)
    assert check_causality(leaky, positions=[3], **inputs())  # a segment ends there
    assert not check_causality(leaky, positions=[4], **inputs())


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ValueError, match="inputs: expected at least one"):
        check_causality(lambda: None)
    with pytest.raises(ValueError, match="inputs: expected one sequence length"):
        check_causality(lambda x, y: x, x=torch.zeros(1, 3, 2), y=torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="function: expected an output of length 3"):
        check_causality(lambda x: x.sum(-2), x=torch.zeros(1, 3, 2))
