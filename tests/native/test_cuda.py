"""The CUDA operators against the C++ ones, on a GPU and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from flashmark import native
from flashmark.nystrom import landmark_core
from tests import helpers

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_cuda()),
    reason="no GPU" if not torch.cuda.is_available() else "the library holds no CUDA operators",
)


def random_bool(*shape, density=0.5):
    return torch.rand(*shape) < density


def assert_equal(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("size", [(40, 70, 16, 32), (130, 129, 64, 128), (1, 1, 16, 16)], ids=str)
def test_dense_tiles_have_the_same_bits_and_classes(size):
    q_len, kv_len, block_q, block_kv = size
    visible = random_bool(2, 2, q_len, kv_len)
    visible[0, 0], visible[1, 0] = True, False
    bits, counts = native.pack_dense(visible, block_q, block_kv)
    on_gpu = native.pack_dense(visible.cuda(), block_q, block_kv)
    for actual, expected in zip(on_gpu, (bits, counts), strict=True):
        assert_equal(actual, expected)
    area = block_q * block_kv
    classes, _, _, found = native.distinct_tiles(bits, counts, area)
    numbers, rows, visible_of_row, taken = native.distinct_tiles(
        *on_gpu, area, max_tiles=int(found) + 2
    )
    assert_equal(taken, found)
    numbers = numbers.cpu()
    assert torch.equal(numbers.clamp(max=0) * (numbers < 0), classes.clamp(max=0) * (classes < 0))
    partial = classes >= 0
    assert_equal(rows[numbers[partial].long().cuda()], bits[partial])
    assert_equal(visible_of_row[numbers[partial].long().cuda()], counts[partial])
    first = dict.fromkeys(numbers[partial].tolist())
    assert list(first) == list(range(int(found)))  # in the order of their first appearance


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 3, 33, 70), (1, 2, 300, 40)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lists_are_the_same_alone_and_in_a_graph(shape, density):
    visible, classes = random_bool(*shape, density=density), torch.randint(-2, 3, shape).int()
    area = torch.tensor([0, 256, 7, 8, 9])
    capacity = classes.numel()

    def flat(*given):
        rows, cols, kept, taken = native.tile_lists(*given, capacity=capacity)
        return [*rows, *cols, kept, taken]

    expected, given = flat(visible, classes, area), (visible.cuda(), classes.cuda(), area.cuda())
    for actual, wanted in zip(flat(*given), expected, strict=True):
        assert_equal(actual, wanted)
    graph = torch.cuda.CUDAGraph()
    given[0].zero_()
    with torch.cuda.graph(graph):
        captured = flat(*given)
    given[0].copy_(visible)
    graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        assert_equal(actual, wanted)


@pytest.mark.parametrize("flag", [True, False], ids=["softmax", "kernel"])
@pytest.mark.parametrize("count", [1, 5, 33, 64, 128, 256])
@pytest.mark.parametrize("core", [native.tied_core, native.tikhonov_core])
def test_cores_and_gradients_agree_with_the_cpu(core, count, flag):
    X = helpers.randn(3, count, 24)
    matrix = X @ X.mT / 24**0.5 if core is native.tied_core else torch.softmax(X @ X.mT, -1)
    dcore = helpers.randn(3, count, count, seed=1)

    def run(matrix, dcore):
        matrix = matrix.clone().requires_grad_()
        out = core(matrix, 1e-3, flag)
        return out.detach(), torch.autograd.grad(out, matrix, dcore)[0]

    for actual, expected in zip(run(matrix.cuda(), dcore.cuda()), run(matrix, dcore), strict=True):
        error = (actual.cpu() - expected).norm()
        assert error <= 1e-6 * expected.norm().clamp_min(1e-3)


@pytest.mark.parametrize("kind", ["softmax", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_from_landmarks_to_the_core_and_back(dtype, kind):
    X = helpers.randn(3, 64, 24, dtype=dtype)
    dcore = helpers.randn(3, 64, 64, dtype=dtype, seed=1)

    def run(X, dcore):
        X = X.clone().requires_grad_()
        core = landmark_core(X, kind=kind)
        return core.detach(), torch.autograd.grad(core, X, dcore)[0]

    wanted = run(X.double(), dcore.double())
    for actual, expected in zip(run(X.cuda(), dcore.cuda()), wanted, strict=True):
        helpers.assert_close(actual.cpu(), expected, 1e-5)
