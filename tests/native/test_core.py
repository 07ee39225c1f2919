"""The landmark core in C++ against the PyTorch path in float64."""

from __future__ import annotations

import pytest
import torch

from flashmark import native
from flashmark.nystrom import landmark_core as landmarks
from flashmark.nystrom.landmark_core import init_landmarks, landmark_core
from tests import helpers
from tests.native.cases import in_pytorch, needs_native  # noqa: F401

pytestmark = [needs_native, pytest.mark.filterwarnings("ignore:untied landmarks")]

KINDS = ["softmax", "kernel"]
COUNTS = [1, 2, 3, 16, 17, 31, 33, 64, 100, 256]


def symmetric_scores(heads, count, *, dtype=torch.float32, spread=1.0):
    X = helpers.randn(heads, count, 24, dtype=torch.float64) * spread
    return (X @ X.mT / 24**0.5).to(dtype)


def solved(core, matrix, dcore, *options, **more):
    """The core and its gradient."""
    matrix = matrix.clone().requires_grad_()
    out = core(matrix, *options, **more)
    return out.detach(), torch.autograd.grad(out, matrix, dcore)[0]


def assert_close(actual, expected, tolerance):
    """In the norm of each head; only a gradient that vanishes has an absolute bound."""
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).norm(dim=(-2, -1))
    assert (error <= tolerance * expected.norm(dim=(-2, -1)).clamp_min(1e-3)).all(), error


@pytest.mark.parametrize("softmax", [True, False], ids=KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_tied_core_and_gradient_to_one_in_a_million(count, softmax):
    scores, dcore = symmetric_scores(3, count), helpers.randn(3, count, count, seed=9)
    core, dscores = solved(native.tied_core, scores, dcore, 1e-4, softmax)
    wanted = solved(landmarks._tied_core, scores.double(), dcore.double(), 1e-4, softmax)
    assert core.dtype == dscores.dtype == torch.float32
    assert_close(core, wanted[0], 1e-6)
    assert_close(dscores, (wanted[1] + wanted[1].mT) / 2, 1e-6)


@pytest.mark.parametrize("unit_rows", [True, False], ids=KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_tikhonov_core_and_gradient_to_one_in_a_million(count, unit_rows):
    matrix = torch.softmax(2 * helpers.randn(3, count, count), -1)
    dcore = helpers.randn(3, count, count, seed=9)
    core, dmatrix = solved(native.tikhonov_core, matrix, dcore, 1e-4, unit_rows)
    wanted = solved(landmarks._tikhonov_core, matrix.double(), dcore.double(), 1e-4, unit_rows)
    assert_close(core, wanted[0], 1e-6)
    assert_close(dmatrix, wanted[1], 1e-6)


@pytest.mark.parametrize("pair", [False, True], ids=["tied", "pair"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_landmarks_agree_to_rounding(in_pytorch, pair, kind):  # noqa: F811
    X = helpers.randn(2, 3, 20, 16, dtype=torch.float64).requires_grad_()
    Y = helpers.randn(2, 3, 20, 16, dtype=torch.float64, seed=1).requires_grad_() if pair else None
    inputs = (X, Y) if pair else (X,)

    def run():
        core = landmark_core(X, Y, kind=kind)
        return core, *torch.autograd.grad(core.square().sum(), inputs)

    for actual, expected in zip(run(), in_pytorch(run), strict=True):
        assert actual.shape == expected.shape
        assert_close(actual, expected, 1e-8)  # a pair's normal equations have a condition of 1e8


@pytest.mark.parametrize("wide", [True, False], ids=["float64-inside", "float32-inside"])
def test_both_arithmetics_meet_the_float32_budget(wide):
    scores, dcore = symmetric_scores(4, 48), helpers.randn(4, 48, 48, seed=2)
    core, dscores = solved(native.tied_core, scores, dcore, 1e-3, True, wide=wide)
    wanted = solved(landmarks._tied_core, scores.double(), dcore.double(), 1e-3, True)
    assert_close(core, wanted[0], 1e-5)
    assert_close(dscores, (wanted[1] + wanted[1].mT) / 2, 5e-5)


@pytest.mark.parametrize("pair", [False, True], ids=["tied", "pair"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(pair, kind):
    X = helpers.randn(1, 5, 4, dtype=torch.float64).requires_grad_()
    Y = helpers.randn(1, 5, 4, dtype=torch.float64, seed=1).requires_grad_() if pair else None
    inputs = (X, Y) if pair else (X,)
    assert torch.autograd.gradcheck(lambda *given: landmark_core(*given, kind=kind), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: landmark_core(*given, kind=kind), inputs)


@pytest.mark.parametrize("wide", [True, False], ids=["float64-inside", "float32-inside"])
@pytest.mark.parametrize("count", [2, 17, 64])
def test_a_singular_core_takes_the_jitter_that_was_asked_for(count, wide):
    scores = torch.full((2, count, count), 3.0)  # all landmarks alike
    core, _, used = torch.ops.flashmark_native.tied_core(scores, 1e-2, True, wide)
    assert torch.equal(used, torch.full((2,), 1e-2, dtype=torch.float64))
    wanted = landmarks._tied_core(scores.double(), 1e-2, True)
    assert_close(core, wanted, 1e-6 if wide else 1e-4)


def test_an_indefinite_core_takes_ten_times_the_jitter_until_it_is_definite():
    scores = torch.zeros(2, 8, 8)
    scores[0, 4, 2] = scores[0, 2, 4] = (
        0.5  # exp(0.5) off a unit diagonal: no jitter below 0.65 will do
    )
    core, _, used = torch.ops.flashmark_native.tied_core(scores, 1e-3, True, True)
    assert used.tolist() == pytest.approx([1.0, 1e-3])
    assert core.isfinite().all()
    torch.testing.assert_close(core.sum(-1), torch.ones(2, 8))
    wanted = [landmarks._tied_core(scores[n].double(), j, True) for n, j in ((0, 1.0), (1, 1e-3))]
    assert_close(core, torch.stack(wanted), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 30.0, 300.0])
def test_core_and_gradient_stay_finite_at_any_spread_of_the_landmarks(kind, spread):
    X = (helpers.randn(2, 32, 16) * spread).requires_grad_()
    for jitter in (1e-4, 1e-9):
        core = landmark_core(X, kind=kind, jitter=jitter)
        assert core.isfinite().all()
        assert torch.autograd.grad(core.sin().sum(), X)[0].isfinite().all()


def test_landmarks_of_very_different_norm_keep_the_bound_of_the_pytorch_path(in_pytorch):  # noqa: F811
    X = helpers.randn(1, 6, 16, dtype=torch.float64)
    X[0, :2] *= 8.0  # roots beyond e^-40 of the largest
    X.requires_grad_()

    def run():
        core = landmark_core(X, scale=1.0)
        return core, torch.autograd.grad(core.sin().sum(), X)[0]

    (core, dX), (wanted, dwanted) = run(), in_pytorch(run)
    assert_close(core, wanted, 1e-9)
    assert_close(dX, dwanted, 1e-9)


def test_scores_that_are_not_finite_give_nan_for_their_head_alone():
    scores = symmetric_scores(3, 20)
    scores[1, 4, 4] = float("nan")
    core = native.tied_core(scores, 1e-4)
    assert core[1].isnan().any()
    assert torch.equal(core[::2], native.tied_core(scores[::2], 1e-4))


@pytest.mark.parametrize("threads", [1, 3])
def test_heads_do_not_depend_on_each_other_or_on_threads(threads):
    scores, dcore = symmetric_scores(7, 33), helpers.randn(7, 33, 33, seed=4)
    alone = [solved(native.tied_core, scores[n : n + 1], dcore[n : n + 1], 1e-4) for n in range(7)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        core, dscores = solved(native.tied_core, scores, dcore, 1e-4)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(core, torch.cat([x for x, _ in alone]))
    assert torch.equal(dscores, torch.cat([x for _, x in alone]))


def test_strided_scores_and_gradients():
    scores = symmetric_scores(4, 20)
    dcore = helpers.randn(4, 20, 20, seed=3)
    strided, dstrided = torch.empty(20, 20, 8).fill_(9), torch.empty(20, 20, 8).fill_(9)
    strided.permute(2, 0, 1)[::2].copy_(scores)
    dstrided.permute(2, 0, 1)[::2].copy_(dcore)
    found = solved(
        native.tied_core, strided.permute(2, 0, 1)[::2], dstrided.permute(2, 0, 1)[::2], 1e-4
    )
    for actual, expected in zip(found, solved(native.tied_core, scores, dcore, 1e-4), strict=True):
        assert torch.equal(actual, expected)


def test_no_heads_and_more_landmarks_than_the_kernels_take():
    assert landmark_core(torch.zeros(0, 8, 4)).shape == (0, 8, 8)
    assert landmark_core(init_landmarks(1, 300, 16)).isfinite().all()
    with pytest.raises(ValueError, match="M from 1 to 256"):
        native.tied_core(torch.zeros(1, 300, 300), 1e-4)


def test_transforms_of_torch_func_take_the_pytorch_path():
    X = helpers.randn(3, 2, 6, 8)
    wanted = landmark_core(X)
    torch.testing.assert_close(torch.func.vmap(landmark_core)(X), wanted)
    tangent = helpers.randn(3, 2, 6, 8, seed=5)
    out, moved = torch.func.jvp(landmark_core, (X,), (tangent,))
    torch.testing.assert_close(out, wanted)
    assert moved.isfinite().all()


def test_a_second_derivative_needs_the_pytorch_twin():
    scores = symmetric_scores(1, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="again: expected a function"):
        torch.autograd.grad(native.tied_core(scores, 1e-4).sum(), scores, create_graph=True)


@pytest.mark.parametrize("name", ["tied_core", "tikhonov_core"])
def test_operators_keep_their_schema(name):
    operator = getattr(torch.ops.flashmark_native, name).default
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, (symmetric_scores(2, 5), 1e-4, True, True), test_utils=checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 4, 16), (3, 2, 17, 8), (64, 24), (2, 100, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_core_without_gradients_is_that_with_gradients(shape, dtype, kind):
    X = helpers.randn(*shape, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        core = landmark_core(X, kind=kind)
    wanted = landmark_core(X.double().requires_grad_(), kind=kind).detach()
    assert core.dtype == torch.promote_types(dtype, torch.float32)
    assert core.shape == (*shape[:-1], shape[-2])
    assert_close(core, wanted, 1e-11 if dtype == torch.float64 else 1e-6)


def test_strided_landmarks_and_no_heads():
    X = helpers.randn(2, 12, 20)
    strided = helpers.randn(20, 2, 24).permute(1, 2, 0)[:, ::2].copy_(X)
    helpers.assert_identical(landmark_core(strided), landmark_core(X))
    assert landmark_core(X[:0]).shape == (0, 12, 12)


def test_landmarks_that_are_not_finite_give_nan_for_their_head_alone():
    X = helpers.randn(3, 6, 8)
    wanted = landmark_core(X)
    X[1, 2, 3] = float("nan")
    core = landmark_core(X)
    assert core[1].isnan().all()
    helpers.assert_identical(core[[0, 2]], wanted[[0, 2]])


def test_the_operator_of_landmarks_keeps_its_schema():
    operator = torch.ops.flashmark_native.landmarks_core.default
    for shape in ((2, 5, 7), (3, 2, 5, 7)):
        torch.library.opcheck(operator, (helpers.randn(*shape), 0.3, 1e-4, True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 2, 17, 8), (64, 24)], ids=str)
def test_one_operator_from_landmarks_to_the_core_and_one_back(shape, kind):
    X = helpers.randn(*shape).requires_grad_()
    dcore = helpers.randn(*shape[:-1], shape[-2], seed=1)
    wide = X.detach().double().requires_grad_()
    wanted = landmark_core(wide, kind=kind)
    core = landmark_core(X, kind=kind)
    assert type(core.grad_fn).__name__ == "_LandmarksCoreBackward"
    assert_close(core.detach(), wanted.detach(), 1e-6)
    (dX,) = torch.autograd.grad(core, X, dcore)
    assert_close(dX, torch.autograd.grad(wanted, wide, dcore.double())[0], 2e-6)


def test_one_operator_from_landmarks_has_two_derivatives():
    X = helpers.randn(1, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(landmark_core, X)
    assert torch.autograd.gradgradcheck(landmark_core, X)


def test_the_operators_from_landmarks_keep_their_schemas():
    operators, X = torch.ops.flashmark_native, helpers.randn(3, 2, 5, 7)
    torch.library.opcheck(operators.landmarks_core_saving.default, (X, 0.3, 1e-4, True))
    core, inverse, used = operators.landmarks_core_saving(X, 0.3, 1e-4, True)
    torch.library.opcheck(
        operators.landmarks_core_backward.default, (X, inverse, used, core, 0.3, True)
    )
