"""The examples run from start to end, on little text and for few steps."""

from __future__ import annotations

import importlib
import sys

import pytest

from examples import text

EXAMPLES = {
    "first_token": (["--steps", "4"], "The likeliest lines"),
    "encoder_decoder": (["--steps", "2"], "all letters at once against one by one"),
    "masked_lm": (["--steps", "4"], "masked bytes guessed"),
    "parallel_decoding": (["--steps", "2"], "in 64 calls: the same bits"),
    "parallel_memory": (["--steps", "2"], "one by one: the same bits"),
    "generate": (["--steps", "2"], "same bytes      same bytes"),
    "long_decode": (["--prompt", "40", "--new", "6"], "last logits against no cache"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, monkeypatch, capsys):
    arguments, expected = EXAMPLES[name]
    module = importlib.import_module(f"examples.{name}")
    some = text.standard_library(200_000)
    monkeypatch.setattr(module, "standard_library", lambda: some)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name == "generate":
        monkeypatch.setattr(module, "NEW", 6)
    module.main()
    shown = capsys.readouterr().out
    assert expected in shown and "DIFFERENT" not in shown
