"""Stretches that are done again piece by piece: none of a module as it is made."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark.kernels.nystrom import arguments, configs
from flashmark.nn import NystromAttention
from tests import helpers
from tests.interpreter.nystrom_backend import op
from tests.nystrom.cases import Case

TOKENS, SPAN = 320, 128


@pytest.fixture
def rises(monkeypatch):
    """The notes that launches leave of where scores rise too far."""
    noted, make = [], arguments.new_rises

    def note(*args):
        noted.append(make(*args))
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
    stretches, slots = rises  # of the forward and of the backward
    assert stretches.tolist() == [128, 256, 320]
    slot = 64 if marks > 32 else 32
    assert slots[: TOKENS // slot].tolist() == list(range(slot, TOKENS + 1, slot))


def test_a_steep_decay_still_rises(rises):
    made = module(8)
    query, key, value = (x.detach().bfloat16() for x in made.project(helpers.randn(1, TOKENS, 64)))
    op(query, key, value, made.landmarks.detach(), decay=torch.full((1, 8), 4.0))
    assert (rises[0] < torch.tensor([128, 256, 320])).all()


def test_scores_that_rise_through_a_slot_but_not_through_half_of_it():
    """Query side and key side of the backward have chunks of different lengths."""
    arguments = Case(150, 40).arguments(torch.bfloat16)
    marks = arguments["landmarks"].detach()
    ramp = torch.arange(150)[:, None] * marks[0, 0] / marks[0, 0].square().sum() * 6.0
    arguments["key"] = (arguments["key"].detach() + ramp).bfloat16().requires_grad_()
    report = flashmark.check(op, **arguments)
    assert report.ok, f"\n{report}"
