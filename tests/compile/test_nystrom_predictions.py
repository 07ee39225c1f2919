"""The committed predictions of Nyström attention are those of the model, and those of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compile import budgets, nystrom_predictions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
SHOWN = "3.7.1"  # Triton


def rows_of(triton: str) -> list[nystrom_predictions.Prediction]:
    return [x for x in nystrom_predictions.table() if x.triton == triton]


def test_the_page_shows_the_committed_predictions():
    for pass_ in nystrom_predictions.EXACT:
        rows = [x for x in rows_of(SHOWN) if x.pass_ == pass_]
        assert nystrom_predictions.drawn(rows) in PAGE.read_text()


def test_no_prediction_is_below_the_floor():
    for row in nystrom_predictions.table():
        assert row.floor < row.low <= row.predicted <= row.high


def test_committed_rows_are_the_models():
    known = [x for x in nystrom_predictions.table() if (x.triton, x.ptxas) == budgets.tools()]
    if not known:
        pytest.skip("no prediction was committed for these versions")
    assert sorted(nystrom_predictions.predict(), key=str) == sorted(known, key=str)
