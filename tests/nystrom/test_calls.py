"""The way of a call of Nyström attention: few frames of ours from the public function on."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark.nystrom import attention
from flashmark.nystrom.operator import OPERATOR
from tests import helpers
from tests.frames import MOST_FRAMES, Reached, stop


@pytest.mark.parametrize("with_state", [False, True], ids=["from-start", "resumed"])
def test_frames_from_the_public_function_to_the_kernel(with_state, monkeypatch):
    monkeypatch.setitem(OPERATOR.forward, "cpu", stop)
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: "cpu")
    inputs = helpers.qkv(1, 2, 24, 16, grad=False)
    options = {"core": torch.eye(4).expand(2, 4, 4)}
    if with_state:
        options |= {"state": flashmark.NystromState.empty(1, 2, 4, 16), "return_state": True}
    with pytest.raises(Reached) as reached:
        flashmark.nystrom_attention(*inputs, helpers.randn(2, 4, 16), **options)
    frames = reached.value.args[0]
    assert "nystrom_attention" in frames
    assert len(frames) <= MOST_FRAMES, frames
