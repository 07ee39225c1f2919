"""The script for a GPU, as far as it can be held to its word without one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import gpu, masks
from bench.accuracy import CASES, accuracy
from bench.compare import Job, Settings, compare
from bench.gpu import without_red
from bench.patterns import PATTERNS
from bench.report import print_report
from bench.runner import run_jobs
from bench.targets import targets

CPU = torch.device("cpu")
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.interpreter.test_block_sparse_features" name="a"/>
<testcase classname="tests.interpreter.test_nystrom_kernels" name="b"><failure/></testcase>
<testcase classname="tests.interpreter.test_nystrom_kernels" name="c"><error/></testcase>
</testsuite></testsuites>"""
GREEN = '<testsuites><testsuite><testcase classname="a" name="a"/></testsuite></testsuites>'


ALL_GREEN = dict.fromkeys(("block_sparse", "nystrom", "hybrid", "forms"), GREEN)


def pretend(monkeypatch, verdicts: dict[str, str | None]) -> list[list[str]]:
    """Instead of pytest: write a JUnit file for each operator, or run out of time (None)."""
    commands = []

    def run(command, seconds, **options):
        commands.append(command)
        junit = next(x for x in command if x.startswith("--junitxml=")).partition("=")[2]
        text = verdicts[gpu.operator_of(Path(command[-1]).name)]
        if text is not None:
            Path(junit).write_text(text)

    monkeypatch.setattr(gpu, "run_limited", run)
    return commands


def test_failed_tests_make_their_operator_red_and_no_other(monkeypatch, tmp_path):
    pretend(monkeypatch, ALL_GREEN | {"nystrom": JUNIT})
    assert gpu.run_tests(CPU, tmp_path, minutes=4) == {"nystrom": "2 tests failed"}


def test_tests_that_did_not_finish_make_their_operator_red_and_no_other(monkeypatch, tmp_path):
    (tmp_path / "tests-nystrom.xml").write_text(GREEN)  # of an earlier call
    pretend(monkeypatch, ALL_GREEN | {"nystrom": None})
    assert set(gpu.run_tests(CPU, tmp_path, minutes=4)) == {"nystrom"}


def test_a_run_of_no_tests_is_red(monkeypatch, tmp_path):
    none = "<testsuites><testsuite></testsuite></testsuites>"
    pretend(monkeypatch, ALL_GREEN | {"hybrid": none})
    assert gpu.run_tests(CPU, tmp_path, minutes=4) == {"hybrid": "none of its tests ran"}


def test_operators_without_time_for_tests_are_red(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, ALL_GREEN)
    assert set(gpu.run_tests(CPU, tmp_path, minutes=0)) == set(ALL_GREEN)
    assert not commands


def test_where_what_may_hang_is_red_the_rest_runs_without_it(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, ALL_GREEN | {"forms": None})
    assert set(gpu.run_tests(CPU, tmp_path, minutes=4)) == {"forms"}
    first, *others = commands
    assert [Path(x).name for x in first if x.endswith(".py")] == [
        "test_block_sparse_forms.py", "test_block_sparse_gluon_backward.py",
    ]  # fmt: skip
    assert "--pointers" not in first and all("--pointers" in command for command in others)


def test_the_hopper_forms_can_be_left_out(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, ALL_GREEN | {"forms": None})
    assert gpu.run_tests(CPU, tmp_path, minutes=4, pointers=True) == {}
    assert len(commands) == 3 and all("--pointers" in command for command in commands)


def test_tests_that_hang_end_with_all_their_processes(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        gpu.run_limited(["sh", "-c", "sleep 100 & echo $!; wait"], 0.5, stdout=file)
    child = int(log.read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return  # ended; nobody has collected it
        time.sleep(0.1)
    pytest.fail("a process of the tests still runs")


def test_flexattention_is_compiled_for_a_few_works_on_a_gpu(monkeypatch):
    titles = []
    monkeypatch.setattr(masks, "attention_job", lambda work, fighters, rounds: (work, fighters))
    monkeypatch.setattr(masks, "PATTERNS", {n: lambda n, device, name=n: name for n in PATTERNS})
    for work, fighters in masks.masks(Settings(torch.device("cuda"), 10, False)):
        if any(fighter.name.startswith("flex") for fighter in fighters):
            titles.append((work.pattern, work.dim, work.n))
    assert len(titles) == 6 and {dim for _, dim, _ in titles} == {128}


def test_every_test_file_of_the_kernels_belongs_to_an_operator(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, ALL_GREEN)
    assert gpu.run_tests(CPU, tmp_path, minutes=4) == {}
    run = {Path(x).name for command in commands for x in command if x.endswith(".py")}
    assert run == {path.name for path in gpu.ROOT.glob("tests/interpreter/test_*.py")}


def row(suite: str, contender: str, ms: float, **more) -> dict:
    columns = {"case": "Nyström M=64", "n": 65536, "dim": 64, "dtype": "bfloat16"}
    columns |= {"direction": "forward+backward", "status": "ok", "batch": 1, "heads": 16}
    columns |= {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "peak_bytes": 2**20}
    return columns | {"suite": suite, "contender": contender} | more


def test_no_time_is_reported_for_an_operator_whose_tests_are_red(capsys):
    rows = [row("nystrom", "flashmark triton", 2.0), row("nystrom", "sdpa causal flash", 90.0)]
    frame = pd.DataFrame(without_red(rows, {"nystrom": "2 tests failed"}))
    print_report(frame)
    report = capsys.readouterr().out
    assert "WRONG" in report and "2 tests failed" in report and "45.00x" not in report
    assert "45.0" not in targets(frame)


def test_targets_come_from_the_csv_and_nothing_else():
    rows = [row("nystrom", "flashmark triton", 2.0), row("nystrom", "sdpa causal flash", 90.0)]
    lines = targets(pd.DataFrame(rows)).splitlines()
    exact = next(line for line in lines if "exact causal" in line)
    assert "45.00x" in exact
    assert "not measured" in next(line for line in lines if ">= 2x fla" in line)


def test_jobs_after_the_time_is_up_are_left_out_and_the_rest_is_saved(tmp_path, capsys):
    job = Job("early", 1, lambda step: [{"case": "early"}])
    saved = tmp_path / "rows.csv"
    assert run_jobs([job], {"machine": "m"}, save=saved) == [{"machine": "m", "case": "early"}]
    assert list(pd.read_csv(saved).case) == ["early"]
    assert run_jobs([job], {}, until=0.0) == []
    assert "left out: early" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_accuracy_suite_runs_every_case_on_the_cpu(name):
    settings = Settings(CPU, rounds=1, quick=True, lengths=(19,), dtypes=(torch.float32,))
    job = next(job for job in accuracy(settings) if f"of {name}," in job.title)
    (found,) = job.run(lambda: None)
    assert found["status"] == "ok" and found["error"] <= found["error_allowed"]


def test_a_contender_that_breaks_is_wrong_untimed_and_takes_no_other_along():
    def breaks():
        def run():
            raise RuntimeError("illegal memory access")

        return run, {}

    ready = {"broken": breaks, "sound": lambda: (lambda: torch.zeros(1), {})}
    rows = compare("two", {"case": "two"}, ready, CPU, rounds=1).run(lambda: None)
    broken, sound = rows
    assert broken["status"] == "wrong" and "illegal memory access" in broken["reason"]
    assert "p50_ms" not in broken and "p50_ms" in sound
