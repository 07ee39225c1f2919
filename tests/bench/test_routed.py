"""Suite `routed`: what it times is checked first, and a wrong result has no time."""

from __future__ import annotations

import pytest
import torch

import bench.routed
from bench.compare import Settings
from flashmark import cpu

if not cpu.available():
    pytest.skip(cpu.why_not(), allow_module_level=True)


def rows(direction: str) -> dict[str, dict]:
    settings = Settings(torch.device("cpu"), rounds=1, quick=True, lengths=(200,))
    jobs = [job for job in bench.routed.routed(settings) if job.title.endswith(direction)]
    return {row["contender"]: row for row in jobs[0].run(lambda: None)}


@pytest.mark.parametrize("direction", [", forward", "forward+backward", "decode"])
def test_every_contender_runs(direction):
    found = rows(direction)
    skipped = {"flashmark choice"} if direction == "forward+backward" else set()
    assert {name for name, row in found.items() if row["status"] == "skipped"} == skipped
    assert all(row["status"] in ("ok", "skipped") for row in found.values())
    assert {"flashmark cpu", "flashmark dense", "sdpa causal"} < set(found)


def test_attention_that_reads_other_blocks_than_it_says_is_refused(monkeypatch):
    def another(query, key, value, *given, **options):
        return right(query, key, value.flip(2), *given, **options)

    right = bench.routed.ROUTED
    monkeypatch.setattr(bench.routed, "ROUTED", another)
    row = rows(", forward")["flashmark cpu"]
    assert row["status"] == "wrong" and "error of out" in row["reason"]
