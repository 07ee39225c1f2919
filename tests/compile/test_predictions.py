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
ON_PAGE = {  # by section, launches in its order, each as rate (lowest-highest)
    ("## Gradients", "\n## "): (
        "one-pass-bf16-D64-causal-dropout", "gluon-backward-D64-causal128-bfloat16-dropout",
        "one-pass-bf16-D64-causal-softcap", "gluon-backward-D64-causal128-bfloat16-softcap",
        "gluon-backward-D64-causal128-bfloat16-relative",
    ),
    ("## Budgets", "What is missed"): (
        "gluon-D128-causal128-bfloat16", "forward-bf16-D128-causal-plain",
        "gluon-D64-causal128-bfloat16", "forward-bf16-D64-causal-plain",
        "gluon-backward-D128-causal128-bfloat16", "one-pass-bf16-D128-causal-plain",
        "gluon-backward-D64-causal128-bfloat16", "one-pass-bf16-D64-causal-plain",
    ),
}  # fmt: skip


@pytest.mark.parametrize("section", ON_PAGE, ids=lambda section: section[0].removeprefix("## "))
def test_the_page_has_the_committed_predictions(section):
    first, end = section
    text = PAGE.read_text().partition(first)[2].partition(end)[0]
    found = [tuple(map(int, x)) for x in re.findall(r"(\d+) \((\d+)-(\d+)\)", text)]
    rows = [predictions.table()["3.7.1", "12.8", CAUSAL.name, x] for x in ON_PAGE[section]]
    assert found == [(row.predicted, row.low, row.high) for row in rows]
