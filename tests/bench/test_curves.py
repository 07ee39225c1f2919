"""The curves over lengths: what is left out says why, and the picture comes from the CSV."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from bench import curves
from bench.compare import Settings
from bench.peers import Contender, Unavailable
from bench.plot import plot


def prepared():
    return (lambda: None), {}


def seen(name: str, n: int, seconds: float) -> dict:
    return {name: {"n": n, "status": "ok", "p50_ms": 1e3 * seconds}}


@pytest.mark.parametrize(
    "name, seconds, runs",
    [
        ("sdpa causal", curves.LIMIT / 4.1, True),
        ("sdpa causal", curves.LIMIT / 3.9, False),
        ("flashmark window 512", curves.LIMIT / 3.9, True),
        ("flashmark window 512", curves.LIMIT / 1.9, False),
    ],
)
def test_a_point_beyond_the_limit_is_left_out(name, seconds, runs):
    prepare = curves._in_time(name, prepared, 2048, seen(name, 1024, seconds))
    if runs:
        prepare()
    else:
        with pytest.raises(Unavailable, match="left out beyond N=1024"):
            prepare()


def test_nothing_follows_what_did_not_run():
    before = {"flex causal": {"n": 1024, "status": "skipped", "reason": "no backward"}}
    with pytest.raises(Unavailable, match="no backward"):
        curves._in_time("flex causal", prepared, 2048, before)()
    curves._in_time("sdpa causal", prepared, 2048, before)()


def test_curves_run_and_are_drawn(monkeypatch, tmp_path):
    def not_compiled(compiled):
        def prepare(work):
            raise Unavailable("compiling takes longer than this test")

        return Contender("flex", prepare)

    monkeypatch.setattr(curves, "_flex", not_compiled)
    settings = Settings(torch.device("cpu"), rounds=1, quick=True, lengths=(64, 128))
    where = {"machine": "a CPU", "torch": "2", "date": "today"}
    rows = [where | row for job in curves.curves(settings) for row in job.run(lambda: None)]
    ran = [row for row in rows if row["status"] == "ok"]
    assert {row["direction"] for row in ran} == {"forward", "forward+backward"}
    assert {row["n"] for row in ran} == {64, 128}
    assert len(ran) == 4 * (3 + 1) and len(rows) - len(ran) == 4 * 2
    csv = tmp_path / "cpu_curves.csv"
    pd.DataFrame(rows).to_csv(csv, index=False)
    assert plot(pd.read_csv(csv), csv) == [tmp_path / "cpu_curves.png"]
