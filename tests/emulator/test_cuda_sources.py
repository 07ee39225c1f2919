"""The CUDA kernels of csrc in the emulator, against their C++ versions."""

from __future__ import annotations

import pytest
import torch

from flashmark import native
from flashmark.nystrom import landmark_core as landmark_module
from tests.helpers import assert_close

from . import cuda, nvcc
from .machine import Options
from .races import EmulationError

pytestmark = [
    pytest.mark.skipif(nvcc.NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(not native.available(), reason="the C++ versions are not built"),
]
ORDERS = [Options(), Options(order="ahead", seed=1), Options(order="around")]


def random_bits(*shape: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: o.order)
@pytest.mark.parametrize(
    "shape, block", [((1, 2, 50, 70), (16, 32)), ((2, 1, 33, 45), (8, 20))], ids=str
)
def test_packing(shape, block, options):
    visible = random_bits(*shape)
    visible[..., :16, :32] = True
    for wanted, got in zip(
        native.pack_dense(visible, *block), cuda.pack_dense(visible, *block, options), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: o.order)
def test_distinct_tiles(options):
    """Classes are equal up to the order of rows, here that of first appearance."""
    kinds = random_bits(7, 16, 32, seed=1)
    kinds[0], kinds[1] = False, True
    elements = kinds[torch.randint(7, (40,), generator=torch.Generator().manual_seed(2))]
    bits, counts = native.pack_tiles(elements)
    area = 16 * 32
    classes, tile_bits, visible, found = native.distinct_tiles(bits, counts, area)
    got = cuda.distinct_tiles(bits, counts, area, 9, options)
    assert int(got[3]) == int(found) == 5
    partial = classes >= 0
    assert torch.equal(got[0][~partial], classes[~partial])
    mine, theirs = got[0][partial], classes[partial]
    assert torch.equal(got[1][mine.long()], tile_bits[theirs.long()])
    assert torch.equal(got[2][mine.long()], visible[theirs.long()])
    assert [int(x) for x in mine.unique()] == list(range(5))
    first = [int((mine == n).nonzero()[0]) for n in range(5)]
    assert first == sorted(first)


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: o.order)
@pytest.mark.parametrize("shape", [(1, 2, 9, 40), (2, 1, 270, 3)], ids=str)
def test_tile_lists(shape, options):
    draw = torch.Generator().manual_seed(3)
    classes = torch.randint(-2, 4, shape, generator=draw, dtype=torch.int32)
    classes[..., 1:6] = -1
    visible = random_bits(*shape, density=0.8, seed=4)
    area = torch.tensor([0, 128, 3, 4, 5, 6])
    capacity = visible.numel()
    wanted = native.tile_lists(visible, classes, area, capacity=capacity)
    got = cuda.tile_lists(visible, classes, area, capacity, options)
    for mine, theirs in zip(got[:2], wanted[:2], strict=True):
        for n, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert torch.equal(a, b), n
    assert int(got[2]) == int(wanted[2]) and int(got[3]) == int(wanted[3])


def test_a_removed_barrier_in_the_scan_is_found():
    visible = random_bits(1, 1, 270, 3)
    classes = torch.zeros(visible.shape, dtype=torch.int32)
    area = torch.tensor([0, 128, 3])
    for n in range(4):

        def edit(text, n=n):
            start = text.index("scan_kernel", text.index(".entry", text.index("scan_kernel")) - 200)
            places = [start]
            while len(places) < n + 2:
                places.append(text.index("bar.sync", places[-1] + 1))
            at = places[-1]
            return text[:at] + text[at:].replace("bar.sync \t0;", "", 1).replace(
                "bar.sync 0;", "", 0
            )

        try:
            cuda.tile_lists(visible, classes, area, 810, edit=edit)
        except EmulationError as error:
            assert "scan_kernel" in str(error) and "race" in str(error)
            return
    raise AssertionError("no barrier of the scan was missed")


CORES = {
    "double": (torch.float64, torch.float64, 1e-9),
    "float-inside-double": (torch.float32, torch.float64, 1e-5),
    "float": (torch.float32, torch.float32, 2e-3),
}


@pytest.mark.parametrize("in_shared", [True, False], ids=["shared", "workspace"])
@pytest.mark.parametrize("types", CORES)
@pytest.mark.parametrize("flag", [True, False], ids=["normalised", "plain"])
def test_landmark_core(types, flag, in_shared):
    outer, inner, tolerance = CORES[types]
    wide = inner != outer or outer == torch.float64
    operators = torch.ops.flashmark_native
    draw = torch.Generator().manual_seed(5)
    m = 9
    marks = torch.randn(2, m, 16, generator=draw, dtype=torch.float64)
    scores = (marks @ marks.mT / 4).to(outer)
    square = torch.softmax(torch.randn(2, m, m, generator=draw, dtype=torch.float64), -1).to(outer)
    dcore = torch.randn(2, m, m, generator=draw, dtype=torch.float64).to(outer)
    core = cuda.Core(outer, inner, in_shared)
    for name, matrix, forward in (("tied", scores, operators.tied_core),
                                  ("tikhonov", square, operators.tikhonov_core)):  # fmt: skip
        wanted = forward(matrix, 1e-3, flag, wide)
        got = core.forward(name, matrix, 1e-3, flag)
        for mine, theirs in zip(got, wanted, strict=True):
            assert_close(mine, theirs, tolerance, name)
        if name == "tied":
            gradient = core.tied_backward(matrix, wanted[1], wanted[2], dcore, flag)
            expected = operators.tied_core_backward(matrix, wanted[1], wanted[2], dcore, flag)
        else:
            gradient = core.tikhonov_backward(matrix, wanted[1], dcore, flag)
            expected = operators.tikhonov_core_backward(matrix, wanted[1], dcore, flag)
        assert_close(gradient, expected, tolerance * 10, f"{name} backward")


@pytest.mark.parametrize("in_shared", [True, False], ids=["shared", "workspace"])
@pytest.mark.parametrize("outer", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize("flag", [True, False], ids=["normalised", "plain"])
def test_landmarks_to_core_and_back(outer, flag, in_shared):
    """In float64 inside, against the definition in float64 by autograd."""
    draw = torch.Generator().manual_seed(6)
    m, dim, scale, jitter = 9, 5, 0.4, 1e-3
    X = torch.randn(2, m, dim, generator=draw, dtype=torch.float64).to(outer)
    dcore = torch.randn(2, m, m, generator=draw, dtype=torch.float64).to(outer)
    wide = X.double().requires_grad_()
    wanted = landmark_module._tied_core(scale * wide @ wide.mT, jitter, flag)
    (expected,) = torch.autograd.grad(wanted, wide, dcore.double())
    kernels = cuda.Core(outer, torch.float64, in_shared)
    tolerance = 1e-9 if outer == torch.float64 else 1e-5
    alone, _, _ = kernels.from_landmarks(X, scale, jitter, flag, saving=False)
    core, inverse, used = kernels.from_landmarks(X, scale, jitter, flag, saving=True)
    assert torch.equal(alone, core)
    assert_close(core, wanted.detach(), tolerance)
    dX = kernels.landmarks_backward(X, inverse, used, dcore, scale, flag)
    assert_close(dX, expected, tolerance * 10)
