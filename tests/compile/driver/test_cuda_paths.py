"""Host path of a call on a GPU: the choice of a backend for CUDA tensors that have no memory, and
public functions, gradients and modules down to Triton's launcher.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flashmark
from flashmark import dispatch, masks
from flashmark.hybrid.call import parts_of
from flashmark.kernels.block_sparse import configs
from flashmark.kernels.nystrom import configs as nystrom_configs
from tests.compile.driver import stub

needs_stub = pytest.mark.skipif(stub.why_not() is not None, reason=str(stub.why_not()))
OPERATORS = ("block_sparse", "nystrom", "hybrid")
HALF = torch.bfloat16


@pytest.fixture
def on_cuda(monkeypatch):
    """Makes CUDA tensors without memory, as on a GPU of a compute capability."""

    def make(capability: tuple[int, int], dtype: torch.dtype = HALF) -> torch.Tensor:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        configs.device_arch.cache_clear()
        return torch.empty(1, 4, 256, 64, device="cuda:0", dtype=dtype)

    with FakeTensorMode():
        yield make
    configs.device_arch.cache_clear()


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_takes_triton_where_the_gpu_can(operator, on_cuda):
    chosen = {
        capability: dispatch.choose_backend(operator, "auto", on_cuda(capability))
        for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0))
    }
    assert chosen.pop((7, 5)) == "eager"
    assert set(chosen.values()) == {"triton"}
    assert dispatch.choose_backend(operator, "auto", on_cuda((9, 0), torch.float64)) == "eager"


MOST = {("nystrom", HALF): 128, ("nystrom", torch.float32): 64, ("hybrid", HALF): 128}


@pytest.mark.parametrize(("operator", "dtype"), MOST, ids=str)
def test_more_landmarks_than_a_program_holds_run_in_pytorch(operator, dtype, on_cuda):
    query, most = on_cuda((9, 0), dtype), MOST[operator, dtype]
    choose = dispatch.choose_backend
    assert choose(operator, "auto", query, landmarks=most) == "triton"
    assert choose(operator, "auto", query, landmarks=most + 1) == "eager"
    with pytest.raises(dispatch.BackendUnavailable, match=f"at most {most} landmarks"):
        choose(operator, "triton", query, landmarks=most + 1)


def test_a_call_with_too_many_landmarks_is_refused(on_cuda):
    query = on_cuda((9, 0))
    landmarks, core = query.new_empty(4, 200, 64), query.new_empty(4, 200, 200)
    with pytest.raises(dispatch.BackendUnavailable, match="at most 128 landmarks"):
        flashmark.nystrom_attention(query, query, query, landmarks, core=core, backend="triton")


def test_a_core_that_little_shared_memory_does_not_hold_twice_is_refused(on_cuda):
    query, choose = on_cuda((8, 9)), dispatch.choose_backend
    for operator, gradients in (("nystrom", False), ("hybrid", True)):
        assert choose(operator, "auto", query, landmarks=128, gradients=gradients) == "triton"
    assert choose("nystrom", "auto", query, landmarks=64, gradients=True) == "triton"
    assert choose("nystrom", "auto", query, landmarks=65, gradients=True) == "eager"
    with pytest.raises(dispatch.BackendUnavailable, match="at most 64 landmarks with gradients"):
        choose("nystrom", "triton", query, landmarks=65, gradients=True)
    assert parts_of("auto", "gate", query, 65) == ("triton", "eager")
    assert parts_of("auto", "mass", query, 128) == ("triton", "triton")
    with torch.no_grad():
        assert parts_of("auto", "gate", query, 128) == ("triton", "triton")
    assert choose("nystrom", "auto", on_cuda((8, 0)), landmarks=128, gradients=True) == "triton"


def test_gpus_with_little_shared_memory_are_those_of_the_configs():
    assert {10 * a + b for a, b in dispatch.ROOMY} | {"cpu"} == set(nystrom_configs.ROOMY)


@pytest.mark.parametrize(
    ("backend", "reason"), [("triton", "compute capability 8.0 or later"), ("cpu", "CPU tensors")]
)
def test_a_backend_that_cannot_run_says_why(backend, reason, on_cuda):
    with pytest.raises(dispatch.BackendUnavailable, match=reason):
        dispatch.choose_backend("block_sparse", backend, on_cuda((7, 5)))


def test_configs_are_those_of_the_gpu(on_cuda):
    assert configs.device_arch(on_cuda((9, 0)).device) == 90
    assert configs.device_arch(on_cuda((12, 0)).device) == 120


def test_results_are_on_the_gpu(on_cuda):
    query = on_cuda((9, 0))
    out, lse = flashmark.block_sparse_attention(
        query, query, query, masks.causal(), return_lse=True
    )
    assert out.device == lse.device == query.device
    assert (out.shape, out.dtype) == (query.shape, HALF)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    landmarks, core = query.new_empty(4, 32, 64), query.new_empty(4, 32, 32)
    out = flashmark.nystrom_attention(query, query, query, landmarks, core=core)
    assert (out.device, out.shape, out.dtype) == (query.device, query.shape, HALF)


@pytest.fixture
def driver():
    with stub.launching(code=False) as library:
        yield library


@needs_stub
@pytest.mark.parametrize("expression", [masks.causal(), masks.sliding_window(70)], ids=str)
def test_a_public_call_and_its_gradient_reach_the_launcher(expression, driver):
    query = torch.zeros(1, 2, 200, 64, dtype=HALF, requires_grad=True)
    out = flashmark.block_sparse_attention(query, query, query, expression, backend="triton")
    assert stub.last_launch().kernel == "forward_gluon_kernel"
    before = driver.stub_launches()
    (gradient,) = torch.autograd.grad(out, query, torch.zeros_like(out))
    assert driver.stub_launches() - before == 3  # Delta, then dK and dV, then dQ
    assert gradient.shape == query.shape


@needs_stub
def test_a_public_nystrom_call_reaches_the_launcher(driver):
    query, landmarks = torch.zeros(1, 2, 200, 64, dtype=HALF), torch.zeros(2, 16, 64)
    core = torch.zeros(2, 16, 16)
    flashmark.nystrom_attention(query, query, query, landmarks, core=core, backend="triton")
    assert driver.stub_launches() > 0
    assert stub.last_launch().kernel == "output_kernel"
