"""The suite that tunes: which candidates it takes, and what it says of what it measured."""

from __future__ import annotations

import dataclasses
import sys

import pandas as pd
import pytest
import torch

pytest.importorskip("triton")

from bench import gpu, tuning  # noqa: E402
from bench.candidates import Case, all_cases  # noqa: E402
from bench.compare import Settings  # noqa: E402

QUICK = Settings(torch.device("cpu"), rounds=1, quick=True)
SWEEP = pd.read_csv(tuning.SWEEP)


def test_few_candidates_and_the_shipped_one_first():
    for case in all_cases():
        rows = tuning.few(SWEEP, case)
        assert len(rows) <= 1 + tuning.MOST
        if len(rows):
            assert rows.is_shipped.tolist() == [True] + [False] * (len(rows) - 1)
            gains = rows.predicted_ms.iloc[0] / rows.predicted_ms
            assert ((rows.spilled <= rows.spilled.iloc[0]) | (gains >= 1.25)).all()


def test_the_largest_gain_on_paper_comes_first_and_what_might_hang_last(monkeypatch):
    monkeypatch.setattr(tuning, "_job", lambda case, form, rows, settings: (form, rows))
    monkeypatch.setattr(tuning, "_constants", lambda settings: iter(["constants"]))
    jobs = list(tuning.tuning(dataclasses.replace(QUICK, quick=False)))
    assert jobs.count("constants") == 1
    seen = [job for job in jobs if job != "constants"]
    turns = [tuning.turn(*job) for job in seen]
    assert turns == sorted(turns) and jobs.index("constants") == turns.count(0)
    for n in set(turns):
        gains = [tuning.gain(rows) for (_, rows), t in zip(seen, turns, strict=True) if t == n]
        assert gains == sorted(gains, reverse=True)
    assert {form for form, _ in seen} == set(tuning.FORMS)


@pytest.mark.parametrize(
    "case",
    [
        Case("block_sparse", "forward", 64),
        Case("block_sparse", "backward_kv", 64, block=64),
        Case("block_sparse", "backward_fused", 64, extras=True),
        Case("block_sparse", "decode", 64),
        Case("nystrom", "forward", 64, 64),
        Case("nystrom", "rows", 64, 64),
        Case("nystrom", "read", 64, 64),
    ],
    ids=str,
)
def test_a_job_checks_and_times_its_contenders(case):
    rows = tuning.few(SWEEP, case).iloc[:2]
    found = tuning._job(case, "pointers", rows, QUICK).run(lambda: None)
    assert [row["status"] for row in found] == ["ok"] * len(rows)
    assert all(row["p50_ms"] > 0 and row["error"] <= row["error_allowed"] for row in found)
    assert [row["config"] for row in found] == rows.config.tolist()


def test_a_config_is_in_use_while_its_run_is_timed(monkeypatch):
    case = Case("block_sparse", "forward", 64)
    _, other = case.candidates()[:2]
    seen = []

    def contender():
        seen.append(case.shipped())
        return (lambda: seen.append(case.shipped())), {"status": "ok"}

    run, _ = tuning._forced(case.using, other, contender, {})
    run()
    assert seen == [other, other] and case.shipped() != other


def test_what_is_wrong_is_not_timed(monkeypatch):
    case = Case("block_sparse", "forward", 64)
    wrong = {"out": (1.0, 1e-5)}
    monkeypatch.setattr(tuning, "_errors_when_small", lambda *args: wrong)
    found = tuning._job(case, "pointers", tuning.few(SWEEP, case), QUICK).run(lambda: None)
    assert {row["status"] for row in found} == {"wrong"}
    assert not any("p50_ms" in row for row in found)


def row(contender: str, ms: float, **more) -> dict:
    found = {"suite": "tuning", "case": "forward, causal, D=64", "contender": contender}
    found |= {"status": "ok", "p50_ms": ms, "config": contender[-4:], "predicted_ms": ms / 2}
    return found | more


def test_winners_name_the_fastest_and_its_ratio():
    rows = [
        row("flashmark a shipped", 3.0), row("flashmark best", 2.0), row("sdpa causal", 2.5),
        row("flashmark fake", 1.0, status="wrong"),
    ]  # fmt: skip
    line = tuning.winners(pd.DataFrame(rows)).splitlines()[-1]
    assert line == "| forward, causal, D=64 | 3 | 2 | best | 1.50 | 1.50 | 2.5 |"


def test_winners_do_not_compare_with_what_was_not_measured():
    rows = [row("flashmark a shipped", 3.0, status="wrong"), row("flashmark best", 2.0)]
    line = tuning.winners(pd.DataFrame(rows)).splitlines()[-1]
    assert "not measured" in line and "best" not in line


def test_a_call_that_has_no_time_says_so(monkeypatch, capsys, tmp_path):
    arguments = ["mask_build", "--device", "cpu", "--quick", "--no-tests", "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments, "--out", str(tmp_path)])
    assert gpu.main() == 1
    assert "no time was left" in capsys.readouterr().out


def test_the_suite_runs_from_the_command_line_and_prints_its_winners(monkeypatch, capsys, tmp_path):
    cases = [Case("block_sparse", "forward", 64), Case("block_sparse", "decode", 64)]
    monkeypatch.setattr("bench.candidates.all_cases", lambda: cases)
    monkeypatch.setattr(tuning, "_constants", lambda settings: iter(()))
    arguments = ["tuning", "--device", "cpu", "--quick", "--no-tests", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments, "--out", str(tmp_path)])
    assert gpu.main() == 0
    assert "| pass | shipped ms |" in capsys.readouterr().out
