"""Candidates and the offline sweep: what is forced is what is compiled, and the CSV is kept."""

from __future__ import annotations

import dataclasses
import sys

import pandas as pd
import pytest

pytest.importorskip("triton")

from bench import sweep  # noqa: E402
from bench.candidates import Case, all_cases, read, written  # noqa: E402
from bench.offline import Report, compiling_for  # noqa: E402

CASES = [
    Case("block_sparse", "forward", 64),
    Case("block_sparse", "forward", 128, block=64),
    Case("block_sparse", "backward_q", 64, extras=True),
    Case("block_sparse", "backward_kv", 128, block=128),
    Case("block_sparse", "backward_grouped", 64),
    Case("block_sparse", "backward_fused", 64),
    Case("block_sparse", "decode", 128),
    *(Case("nystrom", p, 64, 64) for p in ("states", "forward", "rows", "keys", "read", "decode")),
]


def launched(case: Case, config) -> list[tuple[tuple, dict]]:
    """(features, warps and stages) of every launch of the pass under a forced config."""
    seen = []

    def note(name, arguments):
        if case.wanted(name, arguments):
            seen.append(next(x for x in arguments if hasattr(x, "DIM_V")))
        return False

    with compiling_for(90, note), case.using(config):
        case.launch()
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_forced_config_reaches_the_kernel(case):
    for config in case.candidates()[:3]:
        features = launched(case, config)
        assert features
        for F in features:
            if case.family == "nystrom":
                assert (F.CHUNK, F.BLOCK_V) == (config.chunk, config.block_v)
            elif case.pass_ == "decode":
                assert F.BLOCK_N == config.block_n
            else:
                assert (F.BLOCK_M, F.BLOCK_N) == (config.block_m, config.block_n)


def test_nothing_is_forced_afterwards():
    case = CASES[0]
    shipped, other = case.candidates()[:2]
    launched(case, other)
    assert case.shipped() == shipped


def test_candidates_start_with_what_ships_and_repeat_nothing():
    for case in all_cases():
        candidates = case.candidates()
        assert candidates[0] == case.shipped()
        assert len(set(candidates)) == len(candidates)
        if case.block:
            assert all(case.block % max(x.block_m, x.block_n) == 0 for x in candidates)


def test_a_config_is_read_back_as_it_was_written():
    for case in CASES:
        for config in case.candidates():
            assert read(case.family, written(config)) == config


def test_what_cannot_compile_is_a_line_of_its_own(monkeypatch):
    def refuse(case, tokens=1024):
        raise NotImplementedError("no such form here")

    monkeypatch.setattr(Case, "launch", refuse)
    row = sweep.compile_one((CASES[0], CASES[0].shipped()), "sm_90")
    assert row["status"] == "refused" and "no such form" in row["reason"]


def test_a_pass_of_several_launches_is_as_good_as_its_worst():
    reports = [
        Report("a", 4, 1000, threads=128, registers=200, spilled=0, hgmma=3, hmma=0),
        Report("b", 4, 9000, threads=128, registers=255, spilled=8, hgmma=4, hmma=1),
    ]
    row = sweep.summary(reports, limit=232448)
    assert (row["registers"], row["spilled"], row["shared"], row["hgmma"]) == (255, 8, 9000, 7)
    assert row["programs"] == 2 and row["launches"] == 2
    assert sweep.summary(reports, limit=8999)["status"] == "too big"


def row(case: Case, config, **more) -> dict:
    found = {"status": "ok", "launches": 1, "threads": 256, "registers": 200, "spilled": 0}
    found |= {"shared": 65536, "hgmma": 24, "hmma": 0, "programs": 1}
    return sweep.described(case, config) | found | more


def test_shippable_leaves_out_what_spills_more_for_little_or_does_not_fit():
    case = CASES[0]
    ours, *others = case.candidates()
    fates = ({"spilled": 512}, {"status": "too big", "programs": 0}, {}, {"status": "refused"})
    frame = pd.DataFrame(
        [row(case, ours)] + [row(case, x, **fate) for x, fate in zip(others, fates, strict=False)]
    )
    rows = sweep.shippable(frame, case)
    assert set(rows.config) == {written(ours), written(others[2])}
    assert list(rows.predicted_ms) == sorted(rows.predicted_ms)
    assert len(sweep.shippable(frame.assign(predicted_ms=0.0), CASES[3])) == 0
    assert rows[rows.is_shipped].config.tolist() == [written(ours)]


def test_a_spill_is_worth_a_try_where_it_halves_the_work():
    case = Case("nystrom", "keys", 128, 128)
    wide = case.shipped()
    narrow = dataclasses.replace(wide, block_v=wide.block_v // 2)
    frame = pd.DataFrame([row(case, narrow), row(case, wide, spilled=344)])
    with case.using(narrow):
        assert sweep.shippable(frame, case).config.tolist() == [written(wide), written(narrow)]


def test_the_sweep_does_not_compile_again_what_its_csv_has(monkeypatch, tmp_path):
    compiled = []

    def note(item, arch):
        compiled.append(item)
        return row(*item)

    monkeypatch.setattr(sweep, "compile_one", note)
    monkeypatch.setattr(
        sys, "argv", ["sweep", "--passes", "decode", "--out", str(tmp_path / "a.csv")]
    )
    assert sweep.main() == 0
    first = len(compiled)
    assert first > 10
    assert sweep.main() == 0
    assert len(compiled) == first
    sys.argv.append("--again")
    assert sweep.main() == 0
    assert len(compiled) == 2 * first
    saved = pd.read_csv(tmp_path / "a.csv")
    assert len(saved) == first and not saved.duplicated(sweep.KEYS).any()


def test_the_table_comes_from_the_csv(capsys):
    case = CASES[0]
    ours, other = case.candidates()[:2]
    frame = pd.DataFrame([row(case, ours), row(case, other, programs=2)])
    line = sweep.table(frame, [case]).splitlines()[-1]
    assert "block-sparse forward, causal, D=64" in line and "| 2, 2, 2 |" in line
    ratio = float(line.split("|")[-2])
    assert ratio > 1


def test_a_page_gets_the_new_table_in_the_place_of_the_old():
    page = "above\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\nbelow | this\n"
    new = "| a | b |\n|---|---|\n| 5 | 6 |"
    assert sweep.with_table(page, new) == f"above\n\n{new}\n\nbelow | this\n"
    with pytest.raises(SystemExit, match="expected a table headed"):
        sweep.with_table("no table", new)


def test_the_committed_sweep_has_every_shipped_config():
    frame = pd.read_csv(sweep.RESULTS / "sweep_sm90.csv")
    for case in all_cases():
        rows = sweep.shippable(frame, case)
        assert rows.is_shipped.any(), case


def test_the_page_shows_the_committed_sweep():
    frame = pd.read_csv(sweep.RESULTS / "sweep_sm90.csv")
    page = (sweep.RESULTS.parents[1] / "docs/tuning.md").read_text()
    assert sweep.table(frame, all_cases()) in page
    assert sweep.predictions(frame, all_cases()) in page


def test_the_number_of_tokens_does_not_change_what_is_compiled():
    """So what is compiled ahead of a measurement is what the measurement launches."""
    case, hashes = Case("block_sparse", "decode", 64), set()
    for tokens in (1024, 16384):
        with compiling_for(90, case.wanted) as launches:
            case.launch(tokens)
        hashes |= {kernel.hash for _, kernel in launches}
    assert len(hashes) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_configs_compile_in_processes_of_their_own(jobs):
    case = Case("block_sparse", "decode", 64)
    items = [(case, config) for config in case.candidates()[:2]]
    rows = list(sweep.compile_all(items, "sm_90", jobs, sweep.compile_one))
    assert {row["config"] for row in rows} == {written(config) for _, config in items}
    assert all(row["status"] == "ok" and row["hmma"] > 0 for row in rows)


def test_a_whole_call_is_compiled_ahead(monkeypatch):
    seen = []

    def forced(case, tokens=1024):
        seen.append(case.shipped())
        raise RuntimeError("does not compile")

    monkeypatch.setattr(Case, "launch", forced)
    case = CASES[0]
    _, other = case.candidates()[:2]
    sweep.compile_call((case, other), "sm_90")  # what cannot compile says so when it is run
    assert seen == [other]
