"""Stretches that are done again piece by piece: none of a module as it is made."""

from __future__ import annotations

import pytest
import torch

from flashmark.kernels.nystrom import arguments, configs
from flashmark.nn import NystromAttention
from tests import helpers
from tests.interpreter.nystrom_backend import op

TOKENS, SPAN = 320, 128


@pytest.fixture
def rises(monkeypatch):
    """The notes that launches leave of where scores rise too far."""
    noted, make = [], arguments.new_rises

    def note(call, stretches):
        noted.append(make(call, stretches))
        return noted[-1]

    monkeypatch.setattr(arguments, "new_rises", note)
    for name in ("FORWARD_SPAN", "BACKWARD_SPAN", "SERIAL_TOKENS"):
        monkeypatch.setattr(configs, name, SPAN)
    return noted


def module(marks: int):
    torch.manual_seed(0)
    return NystromAttention(64, 1, marks, decay=True)


@pytest.mark.parametrize("marks", [8, 64])
def test_no_stretch_of_a_fresh_module_rises(marks, rises):
    made = module(marks)
    tokens = helpers.randn(1, TOKENS, 64)
    query, key, value = (x.detach().bfloat16().requires_grad_() for x in made.project(tokens))
    decay = made.decay().detach()
    assert decay.max() > 0.99  # forgets within a token
    out = op(query, key, value, made.landmarks.detach(), decay=decay)
    out.float().sum().backward()
    ends = torch.tensor([128, 256, 320], dtype=torch.int32)
    assert len(rises) == 2  # forward and backward
    for noted in rises:
        assert torch.equal(noted, ends)


def test_a_steep_decay_still_rises(rises):
    made = module(8)
    query, key, value = (x.detach().bfloat16() for x in made.project(helpers.randn(1, TOKENS, 64)))
    op(query, key, value, made.landmarks.detach(), decay=torch.full((1, 8), 4.0))
    assert (rises[0] < torch.tensor([128, 256, 320])).all()
