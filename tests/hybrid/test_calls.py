"""The way of a call of hybrid attention: few frames of ours, no public function inside another."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark import hybrid_attention
from flashmark.block_sparse import eager
from flashmark.hybrid import attention, operator
from flashmark.nystrom.eager import interface
from tests import helpers
from tests.frames import MOST_FRAMES, Reached, stop
from tests.hybrid.cases import MERGES

WINDOW = 4


def call(merge: str, grad: bool, **options):
    inputs = helpers.qkv(1, 2, 24, 16, grad=grad)
    gate = torch.full((1, 2, 1, 1), 0.5) if merge == "gate" else None
    landmarks = helpers.randn(2, 4, 16)
    return hybrid_attention(*inputs, landmarks, window=WINDOW, merge=merge, gate=gate, **options)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("with_state", [False, True], ids=["from-start", "resumed"])
def test_frames_from_the_public_function_to_the_kernel(merge, with_state, monkeypatch):
    monkeypatch.setattr(operator, "_forward", stop)
    monkeypatch.setattr(attention, "parts_of", lambda *_, **__: ("cpu", "eager"))
    options = {}
    if with_state:
        state = flashmark.HybridState.empty(1, 2, 4, 16, 16, window=WINDOW, merge=merge)
        options = {"state": state, "return_state": True}
    with pytest.raises(Reached) as reached:
        call(merge, grad=False, **options)
    frames = reached.value.args[0]
    assert frames[-1] == "hybrid_attention"
    assert len(frames) <= MOST_FRAMES, frames


@pytest.mark.parametrize(
    ("merge", "kernel"),
    [("slots", (eager, "forward")), ("gate", (interface, "forward"))],
    ids=["near", "far"],
)
def test_operators_inside_are_run_and_not_checked_again(merge, kernel, monkeypatch):
    monkeypatch.setattr(*kernel, stop)
    with pytest.raises(Reached) as reached:
        call(merge, grad=True, backend="eager")
    public = {"hybrid_attention", "nystrom_attention", "block_sparse_attention"}
    assert [x for x in reached.value.args[0] if x in public] == ["hybrid_attention"]
