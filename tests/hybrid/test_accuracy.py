"""Hybrid attention computes its definition: outputs and every gradient, against float64."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import hybrid_attention, hybrid_statistics, reference
from tests import helpers
from tests.hybrid.cases import BACKENDS, COVERING, MERGES, PACKED, Case


@pytest.fixture(params=BACKENDS)
def op(request):
    run = functools.partial(hybrid_attention, backend=request.param)
    return functools.wraps(hybrid_attention)(run)


def check(op, case: Case, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    report = flashmark.check(op, **case.arguments(dtype))
    assert report.ok, f"\n{report}"


@pytest.mark.filterwarnings("ignore:untied landmarks")
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_float32_against_float64(op, case):
    check(op, case)


@pytest.mark.parametrize("merge", MERGES)
def test_float64_is_the_definition(merge):
    arguments = Case(60, 8, 5, merge, group=2, batch=2).arguments(torch.float64)
    found = hybrid_attention(**arguments, backend="eager")
    helpers.assert_close(found, reference.hybrid_attention(**arguments), 1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (60, 1), (4, 1, 1), (1, 60, 1)], ids=str)
def test_a_gate_of_fewer_dimensions_is_broadcast(op, shape):
    arguments = Case(60, 8, 5, "gate", group=2, kv_heads=2, batch=2).arguments()
    gate = helpers.randn(*shape, seed=3).sigmoid().requires_grad_()
    whole = gate.detach().expand(2, 4, 60, 1).contiguous().requires_grad_()
    one, other = (op(**arguments | {"gate": x}) for x in (gate, whole))
    assert torch.equal(one, other)
    (grad,), (wanted,) = (
        torch.autograd.grad(x.square().sum(), y) for x, y in ((one, gate), (other, whole))
    )
    helpers.assert_close(grad, wanted.sum_to_size(shape), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("merge", MERGES)
def test_half_precision_is_as_good_as_plain_pytorch(op, merge, dtype):
    check(op, Case(65, 8, 13, merge, group=2, v_dim=24), dtype)
    check(op, Case(90, 8, 5, merge, padding=(30, 5)), dtype)


STEEP = [
    Case(70, 8, 8, "slots", spread=30.0, group=2),
    Case(70, 8, 8, "slots", spread=2000.0),
    Case(70, 8, 8, "gate", spread=30.0, group=2),
]


@pytest.mark.parametrize("case", STEEP, ids=str)
def test_large_scores(op, case):
    """Within 2 eps max|score|: an exponent is no better than its rounding."""
    check(op, case)


@pytest.mark.parametrize("merge", MERGES)
def test_a_scale_of_ones_own(op, merge):
    report = flashmark.check(op, **Case(50, 8, 5, merge).arguments(), scale=0.4)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("merge", MERGES)
def test_gradients_of_half_landmarks_are_rounded_once(op, merge, dtype):
    arguments = Case(40, 4, 16, merge, dim=1).arguments(dtype)
    del arguments["landmarks"]
    helpers.check_half_landmarks(lambda x: op(landmarks=x, **arguments), (1, 16, 1), dtype)


def test_head_dimension_one_and_256(op):
    check(op, Case(40, 8, 4, dim=1, v_dim=1))
    check(op, Case(14, 4, 256, dim=256, v_dim=256))


def exact(arguments: dict) -> torch.Tensor:
    tensors = (arguments[name] for name in ("query", "key", "value"))
    return flashmark.block_sparse_attention(*tensors, flashmark.masks.causal())


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("n, window", [(1, 1), (2, 1), (16, 8), (33, 17), (40, 100)])
def test_exact_attention_when_the_window_covers_everything(op, merge, n, window):
    arguments = Case(n, window, 5, merge, group=2).arguments()
    helpers.assert_close(op(**arguments), exact(arguments), 2e-6)


def test_mass_is_exact_when_landmarks_are_all_the_far_keys(op):
    arguments = Case(32, 8, 16, "mass", dim=32).arguments()
    landmarks = arguments["key"][0, :, :16].detach()  # what the last chunk sees from afar
    core = flashmark.landmark_core(landmarks.double(), kind="kernel", jitter=1e-9).float()
    arguments |= {"landmarks": landmarks, "core": core}
    helpers.assert_close(op(**arguments), exact(arguments), 1e-4)


def test_slots_are_exact_when_each_holds_one_key(op):
    arguments = Case(32, 8, 16, dim=32).arguments()
    key = torch.nn.functional.normalize(arguments["key"].detach(), dim=-1) * 5
    arguments |= {"key": key, "landmarks": 1e4 * key[0, :, :16]}  # the softmax picks the key's own
    helpers.assert_close(op(**arguments), exact(arguments), 1e-4)
    occupancy = hybrid_statistics(
        arguments["query"], key, arguments["landmarks"], window=8
    ).occupancy
    helpers.assert_close(occupancy, torch.full((1, 1, 16), 1 / 16), 1e-6)


def test_slots_of_one_landmark_average_the_far_keys(op):
    """One landmark: a row is a softmax over its near keys and one key that counts for many."""
    arguments = Case(24, 8, 1).arguments()
    value = torch.ones_like(arguments["value"])
    helpers.assert_close(op(**(arguments | {"value": value})), value, 1e-6)


def test_empty_slots_have_no_weight_and_no_gradient(op):
    """Less than 1e-30 of a key is no key, not one of a very low logit."""
    arguments = Case(40, 8, 2, dim=16).arguments()
    landmarks = torch.zeros(1, 2, 16)
    landmarks[0, 1, 0] = 400.0
    key = arguments["key"].detach().clone()
    key[..., 0] = -1.0
    inputs = [arguments["query"], key.requires_grad_(), landmarks.requires_grad_()]
    out = op(inputs[0], inputs[1], arguments["value"], inputs[2], window=8)
    alone = op(inputs[0], inputs[1], arguments["value"], inputs[2][:, :1], window=8)
    helpers.assert_close(out, alone, 1e-6)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[2].abs().max() < 1e-30


@pytest.mark.parametrize("merge", MERGES)
def test_rows_that_see_no_key_are_zero_and_have_no_gradient(op, merge):
    arguments = Case(60, 8, 5, merge, padding=(45, 0)).arguments()
    out = op(**arguments)
    assert not out[:, :, :45].any() and out[:, :, 45:].any()
    out.sum().backward()
    for name in ("query", "key", "value"):
        assert not arguments[name].grad[:, :, :45].any(), name


@pytest.mark.parametrize("merge", MERGES)
def test_hidden_keys_and_values_may_hold_anything(op, merge):
    def run(poison):
        arguments = Case(70, 8, 5, merge, padding=(19, 30)).arguments()
        hidden = ~arguments["key_mask"][:, None, :, None]
        for name in ("key", "value"):
            x = arguments[name].detach().masked_fill(hidden, poison)
            arguments[name] = x.requires_grad_()
        out = op(**arguments)
        leaves = [arguments[x] for x in ("query", "key", "value", "landmarks")]
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for actual, wanted in zip(run(torch.nan), run(0.0), strict=True):
        helpers.assert_identical(actual, wanted)


@pytest.mark.parametrize("merge", MERGES)
def test_empty_batches_and_sequences(op, merge):
    arguments = Case(40, 8, 5, merge).arguments()
    for cut in (slice(0, 0), slice(None)), (slice(None), slice(0, 0)):
        tensors = {x: arguments[x][cut[0], :, cut[1]] for x in ("query", "key", "value")}
        if merge == "gate":
            tensors["gate"] = arguments["gate"][cut[0], :, cut[1]]
        out = op(**(arguments | tensors))
        assert out.shape == tensors["query"].shape
        out, state = op(**(arguments | tensors), return_state=True)
        assert out.shape == op(**(arguments | tensors), state=state).shape


def test_mass_that_is_not_positive_is_dropped_and_counted(op):
    """For q = 5 the kernel is extrapolated below 0 at the far keys; for q = 1, a landmark, not."""
    landmarks = torch.tensor([[[1.0], [2.0]]])
    query = torch.where(torch.arange(64) % 4 == 0, 5.0, 1.0).view(1, 1, 64, 1).requires_grad_()
    key = torch.full((1, 1, 64, 1), -1.0, requires_grad=True)
    value = helpers.randn(1, 1, 64, 3, seed=1, grad=True)
    options = {"landmarks": landmarks, "window": 8, "merge": "mass"}
    found = hybrid_statistics(query, key, **options)
    assert found.clamped.tolist() == [[0.25]]
    helpers.assert_close(found.occupancy.sum(-1), torch.ones(1, 1), 1e-6)

    out = op(query, key, value, **options)
    near = op(query[:, :, 48:], key[:, :, 48:], value[:, :, 48:], **options)
    helpers.assert_close(out[:, :, 56::4], near[:, :, 8::4], 1e-6)
    assert not torch.allclose(out[:, :, 57], near[:, :, 9])
    for grad in torch.autograd.grad(out[:, :, 56::4].sum(), (key, value)):
        assert not grad[:, :, :48].any()
    report = flashmark.check(op, query, key, value, **options)
    assert report.ok, f"\n{report}"


def test_statistics_without_a_far_field():
    query, key, _ = helpers.qkv(heads=2, q_len=16, dim=16, kv_heads=1, grad=False)
    found = hybrid_statistics(query, key, helpers.randn(1, 8, 16), window=8, merge="mass")
    assert not found.occupancy.any() and not found.clamped.any()


def test_packed_sequences_have_one_length_each(op):
    """A packed call equals one call for each sequence."""
    arguments = Case(PACKED, 8, 5, packed=True, group=2).arguments()
    bounds = arguments.pop("cu_seqlens")
    whole = op(**arguments, cu_seqlens=bounds)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = {x: arguments[x][:, :, start:stop] for x in ("query", "key", "value")}
        helpers.assert_close(op(**(arguments | part)), whole[:, :, start:stop], 1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_parameters_that_no_row_reads_have_a_gradient_of_zeros(op, merge):
    """In two windows all is near: an optimiser, or a wrapper for many processes, waits for all."""
    case = Case(16, 8, 5, merge, given_core=merge != "slots")
    arguments = case.arguments()
    op(**arguments).sum().backward()
    for name in {"landmarks", "core", "gate"} & arguments.keys():
        assert arguments[name].grad is not None and not arguments[name].grad.any(), name
