"""Path of a call: few frames of ours, no autograd machinery where no gradient is asked for."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from flashmark import block_sparse_attention, masks
from flashmark.block_sparse import attention, eager
from flashmark.block_sparse.operator import OPERATOR
from tests import helpers
from tests.frames import MOST_FRAMES, Reached, stop

MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(5),
}


class Kernel:
    """A Triton kernel that tells how it was reached."""

    def __getitem__(self, grid):
        return stop


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("backend", ["eager", "triton", "cpu"])
def test_frames_from_the_public_function_to_the_kernel(backend, grad, monkeypatch):
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("needs Triton")
        module = importlib.import_module("flashmark.kernels.block_sparse.forward")
        monkeypatch.setattr(module, "forward_kernel", Kernel())
    elif backend == "cpu":
        monkeypatch.setitem(OPERATOR.forward, "cpu", stop)
    else:
        monkeypatch.setattr(eager, "rows", stop)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: backend)
    inputs = helpers.qkv(1, 2, 24, 16, grad=grad)
    with pytest.raises(Reached) as reached:
        block_sparse_attention(*inputs, MASKS["window"])
    frames = reached.value.args[0]
    assert frames[-1] == "block_sparse_attention"
    assert len(frames) <= MOST_FRAMES, frames


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_without_gradients_no_autograd_function_is_made(mask, backend, monkeypatch):
    monkeypatch.setattr(OPERATOR, "_boundary", None)  # calling it would raise
    plain = helpers.qkv(1, 2, 24, 16, grad=False)
    asking = helpers.qkv(1, 2, 24, 16, grad=True)
    expected = block_sparse_attention(*plain, MASKS[mask], backend=backend)
    with torch.no_grad():
        found = block_sparse_attention(*asking, MASKS[mask], backend=backend)
    helpers.assert_identical(found, expected, "out")
    with pytest.raises(AttributeError):
        block_sparse_attention(*asking, MASKS[mask], backend=backend)


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_a_bias_or_sinks_alone_may_ask_for_gradients(name):
    query, key, value = helpers.qkv(1, 2, 24, 16, grad=False)
    extra = {"bias": torch.zeros(2, 47), "sinks": torch.zeros(2)}[name].requires_grad_()
    out = block_sparse_attention(query, key, value, **{name: extra}, backend="eager")
    (grad,) = torch.autograd.grad(out.square().sum(), extra)
    assert grad.shape == extra.shape and grad.abs().max() > 0
