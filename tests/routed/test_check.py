"""flashmark.check holds routed operators to float64, on the blocks that a backend chose itself."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark.dispatch import can_run_cpu
from flashmark.routed import RoutedState
from tests import helpers

BACKENDS = ["eager"] + ["cpu"] * can_run_cpu("routed", torch.zeros(1))


def sound(**changes):
    dtype = changes.pop("dtype", torch.float32)
    made = helpers.qkv(2, 4, 40, 16, kv_heads=2, dtype=dtype)
    options = dict(zip(("query", "key", "value"), made, strict=True))
    options |= {"block_size": 4, "top_k": 3, "backend": "eager"} | changes
    return {name: x for name, x in options.items() if x is not None}


LANDMARKS = helpers.randn(2, 3, 16, seed=5)
GOOD = {
    "mean": lambda: sound(),
    "landmarks": lambda: sound(landmarks=LANDMARKS),
    "scores": lambda: sound(scores=helpers.randn(2, 2, 40, 10, seed=6)),
    "ties": lambda: sound(scores=torch.zeros(2, 2, 40, 10)),
    "half": lambda: sound(dtype=torch.float16),
    "bfloat16": lambda: sound(dtype=torch.bfloat16, landmarks=LANDMARKS.bfloat16()),
    "double": lambda: sound(dtype=torch.float64),
    "sinks-and-cap": lambda: sound(sinks=helpers.randn(4, seed=8), softcap=3.0),
    "mask": lambda: sound(key_mask=torch.rand(2, 40, generator=torch.Generator()) < 0.5),
    "lengths": lambda: sound(kv_lengths=torch.tensor([40, 11])),
    "all-blocks": lambda: sound(top_k=50),
    "none": lambda: sound(top_k=0),
    "state": lambda: sound(return_state=True, state=RoutedState.empty(2, 2, 1, 16)),
    "routing": lambda: sound(return_routing=True, landmarks=LANDMARKS),
    "reference": lambda: sound(backend="reference"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_backend_is_within_budget(name):
    report = flashmark.check(flashmark.routed_attention, **GOOD[name]())
    assert report.ok, str(report)
    names = [row.name for row in report.rows]
    assert {"out", "d query", "d key", "d value"} <= set(names)
    assert ("choice" in names) == (name != "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_within_budget(backend):
    query, key, value = helpers.qkv(1, 4, 40, 16, kv_heads=2)
    bounds = torch.tensor([0, 13, 13, 40])
    given = {"block_size": 4, "top_k": 2, "cu_seqlens": bounds, "backend": backend}
    report = flashmark.check(flashmark.routed_attention, query, key, value, **given)
    assert report.ok, str(report)


def choosing(change):
    """An operator that computes right what it wrongly chose."""

    @functools.wraps(flashmark.routed_attention)
    def op(*args, **kwargs):
        _, routing = flashmark.routed_attention(*args, **kwargs)
        indices = change(routing.indices.clone())
        options = {"near": 1, "block_size": 4, "backend": "eager"}
        out = flashmark.block_topk_attention(*args, indices, **options)
        return out, routing._replace(indices=indices)

    return op


def worst_instead(indices):
    """The lowest block that was not chosen instead of the best one, where there are enough."""
    for i in range(30, 40):
        for row in indices[:, :, i].flatten(0, 1):
            row[0] = next(c for c in range(4) if c not in row)
    return indices


def fewer(indices):
    indices[0, 1, 30, 2] = -1
    return indices


@pytest.mark.parametrize("change", [worst_instead, fewer])
def test_a_wrong_choice_is_found_though_its_attention_is_right(change):
    query, key, value = helpers.qkv(2, 4, 40, 16, kv_heads=2)
    report = flashmark.check(choosing(change), query, key, value, block_size=4, top_k=3)
    wrong = [row.name for row in report.rows if not row.ok]
    assert wrong == ["choice"], str(report)
    assert flashmark.check(choosing(lambda x: x), query, key, value, block_size=4, top_k=3)


def test_a_choice_within_rounding_passes():
    """Two blocks whose scores differ by less than float32 holds."""
    query, key, value = helpers.qkv(1, 2, 40, 16)
    scores = torch.ones(1, 2, 40, 10, dtype=torch.float64)
    scores[..., 1] += 1e-9
    given = {"scores": scores, "block_size": 4, "top_k": 1}
    lower = choosing(lambda chosen: torch.where(chosen == 1, 0, chosen))
    report = flashmark.check(lower, query, key, value, **given)
    row = report.rows[-1]
    assert row.name == "choice" and row.ok and 0.0 < row.error < 1e-8


def test_a_backend_that_attends_to_other_blocks_is_found():
    @functools.wraps(flashmark.routed_attention)
    def op(*args, **kwargs):
        _, routing = flashmark.routed_attention(*args, **kwargs)
        return flashmark.routed_attention(*args, **kwargs | {"top_k": 1})[0], routing

    query, key, value = helpers.qkv(1, 2, 40, 16)
    report = flashmark.check(op, query, key, value, block_size=4, top_k=3)
    verdicts = {row.name: row.ok for row in report.rows}
    assert verdicts["choice"] and not verdicts["out"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_choice_is_checked(backend):
    query, key, value = helpers.qkv(2, 4, 40, 16, kv_heads=2)
    indices = torch.where(torch.arange(40) >= 12, 1, -1).int().expand(2, 2, 40).unsqueeze(-1)
    given = {"block_size": 4, "near": 1, "return_lse": True, "backend": backend}
    report = flashmark.check(flashmark.block_topk_attention, query, key, value, indices, **given)
    assert report.ok, str(report)
    assert {"out", "out[1]", "d query", "d key", "d value"} == {row.name for row in report.rows}


@pytest.mark.parametrize("marks", [None, LANDMARKS], ids=["mean", "landmarks"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_scores_are_checked(backend, marks):
    query, key, _ = helpers.qkv(2, 4, 40, 16, kv_heads=2)
    report = flashmark.check(
        flashmark.block_scores, query, key, marks, block_size=4, backend=backend
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", ["mean", "landmarks", "scores"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_bit_depends_on_later_tokens(backend, kind):
    query, key, value = helpers.qkv(1, 4, 40, 16, kv_heads=2, grad=False)
    inputs = {"query": query, "key": key, "value": value}
    given = {"block_size": 4, "top_k": 2, "backend": backend}
    if kind == "landmarks":
        given["landmarks"] = LANDMARKS
    elif kind == "scores":
        inputs["scores"] = helpers.randn(1, 2, 40, 10, seed=6)
    function = functools.partial(flashmark.routed_attention, **given)
    report = flashmark.check_causality(function, **inputs)
    assert report.ok, str(report)


def test_a_router_that_sees_unfinished_blocks_is_found():
    """The mean of a block tells of its last tokens before they came."""

    def leaky(query, key, value):
        means = key.unflatten(2, (-1, 4)).mean(3)
        chosen = (query @ means.mT).argmax(-1, keepdim=True)
        inside = torch.arange(40) // 4 == chosen
        seen = inside & torch.ones(40, 40).tril().bool()
        scores = (query @ key.mT).masked_fill(~seen, -1e9)
        return torch.softmax(scores, -1) @ value

    query, key, value = helpers.qkv(1, 2, 40, 16, grad=False)
    inputs = {"query": query, "key": key, "value": value}
    assert not flashmark.check_causality(leaky, **inputs)
    fair = functools.partial(flashmark.routed_attention, block_size=4, top_k=1)
    assert flashmark.check_causality(fair, **inputs)
