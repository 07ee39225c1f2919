"""The benchmark and the demo are instruments: each must see what it claims to see."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import flashmark
from bench.oracle import Oracle
from bench.patterns import PATTERNS
from bench.peers import Work
from bench.readme import ROOT, headlines, measurements
from bench.readme import table as readme_table
from bench.report import print_report
from bench.timing import Spread, interleaved, peak_memory
from examples.attention import byte_decoder
from examples.demo import ATTENTIONS, Exact, blind_to_the_future
from examples.text import random_batches, standard_library
from flashmark import masks

CPU = torch.device("cpu")


def work(pattern: str, *, n: int = 300, dtype=torch.float32, backward: bool = True) -> Work:
    return Work(PATTERNS[pattern](n, CPU), 1, 2, n, 16, dtype, CPU, backward)


def red(errors: dict[str, tuple[float, float]]) -> set[str]:
    return {name for name, (error, allowed) in errors.items() if not error <= allowed}


@pytest.mark.parametrize("name", PATTERNS)
def test_expression_and_formula_of_a_pattern_agree(name):
    n = 700  # longer than the window, no multiple of a block
    pattern = PATTERNS[name](n, CPU)
    zero, index = torch.zeros((), dtype=torch.long), torch.arange(n)
    expected = pattern.formula(zero, zero, index[:, None], index)
    assert torch.equal(pattern.mask.to_dense(1, 1, n, n)[0, 0], expected)
    assert torch.equal(
        flashmark.compile_mask(pattern.mask, 1, 1, n, n, device="cpu").to_dense()[0, 0], expected
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_oracle_accepts_right_attention(dtype, backward):
    oracle = Oracle(work("sink_window", n=600, dtype=dtype, backward=backward))
    mask = oracle.work.pattern.mask
    errors = oracle.errors(lambda q, k, v: flashmark.block_sparse_attention(q, k, v, mask))
    assert set(errors) == ({"out", "dq", "dk", "dv"} if backward else {"out"})
    assert red(errors) == set()


def shifted(q, k, v):
    mask = masks.causal() & masks.sliding_window(511)
    return flashmark.block_sparse_attention(q, k, v, mask)


def with_a_nan(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.where(torch.arange(q.shape[2])[:, None] == 5, float("nan"), out)


def without_key_gradient(q, k, v):
    return F.scaled_dot_product_attention(q, k.detach() + 0 * k, v, is_causal=True)


@pytest.mark.parametrize(
    ("pattern", "attention", "wrong"),
    [
        ("window", shifted, {"out", "dq", "dk", "dv"}),
        (
            "window",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            {"out"},
        ),
        ("causal", without_key_gradient, {"dk"}),
        ("causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), {"out", "dq"}),
    ],
    ids=["window-one-short", "no-window", "gradient-missing", "sees-the-future"],
)
def test_oracle_refuses_wrong_attention(pattern, attention, wrong):
    assert wrong <= red(Oracle(work(pattern, n=700)).errors(attention))


def test_oracle_refuses_nan():
    oracle = Oracle(work("causal", n=100, backward=False))  # every row is looked at
    assert red(oracle.errors(with_a_nan)) == {"out"}


@pytest.mark.plain_empty
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_what_is_allocated_and_freed_inside():
    def forty_mebibytes():
        (torch.ones(10 << 20) * 1).sum()  # 40 MiB and its copy

    seen = peak_memory(forty_mebibytes, CPU)
    if seen is None:
        pytest.skip("this machine does not let a process reset its high-water mark")
    assert seen == pytest.approx(80 << 20, rel=0.1)


def counting_runs():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    return calls, {name: (lambda name=name: count(name)) for name in calls}


def test_interleaved_runs_every_contender_in_every_round():
    calls, runs = counting_runs()
    spreads = interleaved(runs, CPU, rounds=4, sample=0.0)
    assert calls == {"a": 5, "b": 5}  # one to warm up, one a round
    assert all(s.p20 <= s.p50 <= s.p80 for s in spreads.values())


def test_interleaved_stops_between_rounds_when_its_time_is_spent():
    calls, runs = counting_runs()
    interleaved(runs, CPU, rounds=4, sample=0.0, budget=0.0)
    assert calls == {"a": 2, "b": 2}


def test_spread_is_in_milliseconds():
    assert Spread.of([0.001, 0.002, 0.003]).p50 == pytest.approx(2.0)
    assert Spread.of([0.002]) == (2.0, 2.0, 2.0)


def test_report_gives_no_number_for_a_wrong_result(capsys):
    common = {"suite": "masks", "case": "causal", "n": 64, "dim": 16, "dtype": "float32"}
    common |= {"direction": "forward", "p20_ms": 1.0, "p50_ms": 1.25, "p80_ms": 2.0}
    rows = [
        common | {"contender": "flashmark eager", "status": "wrong", "reason": "error of dq 1e-1"},
        common | {"contender": "sdpa causal", "status": "ok", "peak_bytes": 1 << 20},
    ]
    print_report(pd.DataFrame(rows))
    ours, theirs = capsys.readouterr().out.splitlines()[-2:]
    assert "WRONG" in ours and "error of dq" in ours and "1.25" not in ours
    assert "1.25" in theirs and "1.00x" in theirs


def test_readme_shows_the_committed_measurements():
    csv, readme = ROOT / "bench/results/cpu.csv", (ROOT / "README.md").read_text()
    if not csv.exists():
        pytest.skip("no measurements are committed")
    frame = measurements(csv)
    assert headlines(frame) in readme
    assert readme_table(frame) in (ROOT / "docs/performance.md").read_text()


def test_readme_table_compares_with_pytorch_and_leaves_out_what_did_not_run():
    common = {"suite": "masks", "case": "window", "n": 64, "dim": 16, "dtype": "float32"}
    common |= {"direction": "forward", "status": "ok", "machine": "a CPU", "threads": 2}
    common |= {"torch": "2", "date": "today", "revision": "abc", "peak_bytes": 3 << 20}
    rows = [
        common | {"contender": "flashmark cpu", "p50_ms": 2.0},
        common | {"contender": "sdpa causal", "p50_ms": 8.0},
        common | {"contender": "flex compiled", "p50_ms": float("nan"), "status": "skipped"},
    ]
    last = readme_table(pd.DataFrame(rows)).splitlines()[-1]
    assert last == "| window, N=64, D=16, float32, forward | 2 (4.0x), 3 MiB | 8, 3 MiB |"


def test_demo_probe_tells_a_leak_from_a_causal_attention():
    _, text = standard_library(limit=2000)
    torch.manual_seed(0)
    causal, leaking = (
        byte_decoder(lambda heads, width, mask=mask: Exact(mask), width=32, heads=2, layers=1)
        for mask in (masks.causal(), masks.sliding_window(64, 1))
    )
    assert blind_to_the_future(causal, text)
    assert not blind_to_the_future(leaking, text)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_demo_attention_decodes_the_last_token_as_its_whole_forward(name):
    attention = ATTENTIONS[name](2, 16)
    query, key, value = (torch.randn(1, 2, 300, 16) for _ in range(3))
    expected = attention(query, key, value)[:, :, -1:]
    torch.testing.assert_close(attention.decoder(key, value)(query[:, :, -1:]), expected)


def test_demo_batches_repeat_with_their_seed():
    text = torch.arange(1000)
    first, again, other = (next(random_batches(text, 3, 20, seed)) for seed in (0, 0, 1))
    assert first.shape == (3, 21)
    assert torch.equal(first, again) and not torch.equal(first, other)
