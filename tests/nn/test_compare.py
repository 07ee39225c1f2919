"""The comparison of attentions: every variant trains, is causal except the one that is not."""

from __future__ import annotations

import sys

import pytest
import torch

import flashmark
from examples import compare, compare_tasks
from examples.compare_variants import LEAKY, VARIANTS
from flashmark.causality import check_causality

CPU = torch.device("cpu")


@pytest.fixture
def task():
    return compare_tasks.recall_task(context=48, window=4, landmarks=4, batch=2, pairs=3)


@pytest.mark.filterwarnings("ignore:untied landmarks")
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_leaky_variant_leaks(task, variant):
    model = compare.build(task, variant, 0, 16, 2)
    text = torch.randint(256, (1, 48), generator=torch.Generator().manual_seed(3))
    assert check_causality(model, input_ids=text).ok == (variant != LEAKY)


def test_all_variants_start_from_the_same_weights(task):
    exact = compare.build(task, "exact", 5, 16, 2).state_dict()
    for variant in VARIANTS:
        other = compare.build(task, variant, 5, 16, 2).state_dict()
        assert all(torch.equal(other[name], weight) for name, weight in exact.items())


def test_no_token_reads_more_than_what_is_told(task):
    for variant in VARIANTS:
        reads = VARIANTS[variant].reads(task.context, task.window, task.landmarks, task.top_k)
        assert 0 < reads <= task.context
    assert VARIANTS["exact"].reads(48, 4, 4, 2) == 48
    assert (
        VARIANTS["routed 4"].reads(256, 16, 64, 4)
        == 96
        == (VARIANTS["hybrid slots"].reads(256, 16, 64, 4))
    )


def test_a_router_learns_from_all_blocks_while_the_rest_stands_still(task, monkeypatch):
    seen = []
    attention = flashmark.routed_attention

    def spy(*args, top_k, **options):
        seen.append(top_k)
        return attention(*args, top_k=top_k, **options)

    monkeypatch.setattr(flashmark, "routed_attention", spy)
    model = compare.build(task, "exact, then routed 4, trained", 0, 16, 2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    compare.fit_routers(model, task, 0, CPU)
    assert set(seen) == {12}
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) != name.endswith("landmarks"), name
    seen.clear()
    model(next(task.batches(0, False))[0])
    assert set(seen) == {task.top_k}


def test_weights_of_exact_attention_are_trained_once(task, monkeypatch):
    trained, fit = [], compare.fit

    def spy(model, *rest):
        trained.append(model)
        fit(model, *rest)

    monkeypatch.setattr(compare, "fit", spy)
    monkeypatch.setattr(compare, "ROUTER_STEPS", 1)
    bar, exact = compare.tqdm(disable=True), {}
    rows = [
        compare.train(task, variant, 0, 2, 16, 2, CPU, bar, exact)
        for variant in ("exact", "exact, then routed 4", "exact, then routed 4, trained")
    ]
    assert len(trained) == 1 and len(exact) == 1
    assert rows[1]["seed"] == 0 and [row["causal"] for row in rows] == ["yes"] * 3


def test_a_csv_keeps_its_columns(tmp_path):
    path = tmp_path / "rows.csv"
    compare.append(path, {"a": 1, "b": 2})
    compare.append(path, {"b": 4, "new": 5, "a": 3})
    assert compare.read(path) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_recall_asks_for_what_was_said_after_the_key(task):
    tokens, targets = next(task.batches(0, False))
    assert ((targets != compare_tasks.IGNORED).sum(1) == 3).all()
    for sample, at in (targets != compare_tasks.IGNORED).nonzero().tolist():
        row, key = tokens[sample].tolist(), int(tokens[sample, at])
        first = row.index(key)
        assert first < 42 <= at and row[first + 1] == row[at + 1] == targets[sample, at]
    assert not torch.equal(tokens, next(task.batches(0, True))[0])


def test_a_run_writes_rows_once_and_goes_on_where_it_stopped(task, tmp_path, monkeypatch):
    monkeypatch.setitem(compare.SMALL, "recall", ((16, 2, 2), lambda: task))
    out = tmp_path / "rows.csv"
    common = ["compare", "--device", "cpu", "--tasks", "recall", "--out", str(out)]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [*common, *arguments])
        compare.main()
        return [(row["variant"], row["seed"], row["causal"]) for row in compare.read(out)]

    assert run("--variants", "exact", LEAKY, "--seeds", "1")[0] == ("exact", "0", "yes")
    rows = run("--variants", "exact", LEAKY, "--seeds", "2")
    assert [row[:2] for row in rows] == [
        ("exact", "0"), (LEAKY, "0"), ("exact", "1"), (LEAKY, "1"),
    ]  # fmt: skip
