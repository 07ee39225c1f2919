"""The committed predictions are those of the model, and the model keeps within the machine."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.compile import budgets, predictions
from tests.compile.predictions import CAUSAL, Kernel, Turn

PEAK = predictions.PROCESSORS * predictions.CLOCK * 4096 / 1e12  # TFLOP/s of the matrix units
TURN = Turn(issue=400, half_rate=300, exponential=500, products=1024, waits=4)
KERNEL = Kernel(TURN, TURN, groups=2, warps=1, rows=64, turns=1, overlapped=True)
FLOPS = 4 * 128 * CAUSAL.seen


def rate(kernel: Kernel, p: float = 3) -> float:
    return kernel.rate(CAUSAL.full, CAUSAL.partial, FLOPS, p)


@pytest.mark.parametrize("unit", ["issue", "half_rate", "exponential", "products", "waits"])
def test_more_of_any_unit_takes_longer(unit):
    turn = dataclasses.replace(TURN, **{unit: 2 * getattr(TURN, unit)})
    assert rate(dataclasses.replace(KERNEL, full=turn)) < rate(KERNEL)


def test_no_kernel_is_predicted_beyond_the_matrix_units():
    idle = Turn(issue=0, half_rate=0, exponential=0, products=1024, waits=0)
    fastest = dataclasses.replace(KERNEL, full=idle, partial=idle, groups=4)
    assert 0.9 * PEAK < rate(fastest, p=50) < PEAK


def test_overlap_and_company_help():
    assert rate(KERNEL) > rate(dataclasses.replace(KERNEL, overlapped=False))
    assert rate(KERNEL) > rate(dataclasses.replace(KERNEL, groups=1))


def test_the_range_holds_the_prediction():
    low, middle, high = (rate(KERNEL, p) for p in predictions.EXPONENTS)
    assert low < middle < high < PEAK


@pytest.mark.parametrize("row", predictions.ROWS[2:3], ids=lambda row: row[1])
def test_a_committed_row_is_the_models(row):
    now = predictions.predict(*row)
    known = predictions.table().get((*budgets.tools(), row[0].name, row[1]))
    if known is None:
        pytest.skip("no prediction was committed for these versions")
    assert known == now


PAGE = Path(__file__).resolve().parents[2] / "docs/gpu.md"
ON_PAGE = (  # launches in the order of the page's budgets, each as rate (lowest-highest)
    "gluon-D128-causal128-bfloat16", "forward-bf16-D128-causal-plain",
    "gluon-D64-causal128-bfloat16", "forward-bf16-D64-causal-plain",
    "gluon-backward-D128-causal128-bfloat16", "one-pass-bf16-D128-causal-plain",
    "gluon-backward-D64-causal128-bfloat16", "one-pass-bf16-D64-causal-plain",
)  # fmt: skip


def test_the_page_has_the_committed_predictions():
    section = PAGE.read_text().partition("## Budgets")[2].partition("What is missed")[0]
    found = [tuple(map(int, x)) for x in re.findall(r"(\d+) \((\d+)-(\d+)\)", section)]
    rows = [predictions.table()["3.7.1", "12.8", CAUSAL.name, launch] for launch in ON_PAGE]
    assert found == [(row.predicted, row.low, row.high) for row in rows]
