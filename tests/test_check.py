"""flashmark.check finds errors and passes correct operators; show_config lists the backends."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import masks
from flashmark.dispatch import can_run_cpu
from tests import helpers


def sound(**changes):
    options = dict(
        zip(
            ("query", "key", "value"), helpers.qkv(2, 4, 70, 16, kv_heads=2, kv_len=90), strict=True
        )
    )
    return options | {"mask": masks.causal(), "return_lse": True, "backend": "eager"} | changes


GOOD = {
    "plain": lambda: sound(),
    "half": lambda: sound(
        **dict(
            zip(
                ("query", "key", "value"),
                helpers.qkv(2, 4, 70, 16, dtype=torch.float16),
                strict=True,
            )
        )
    ),
    "bfloat16": lambda: sound(
        **dict(
            zip(
                ("query", "key", "value"),
                helpers.qkv(1, 2, 70, 16, dtype=torch.bfloat16),
                strict=True,
            )
        )
    ),
    "double": lambda: sound(
        **dict(
            zip(
                ("query", "key", "value"),
                helpers.qkv(1, 2, 70, 16, dtype=torch.float64),
                strict=True,
            )
        )
    ),
    "bias-and-sinks": lambda: sound(
        bias=helpers.randn(4, 159, seed=7), sinks=helpers.randn(4, seed=8)
    ),
    "empty-rows": lambda: sound(mask=~masks.causal()),
    "dropout": lambda: sound(dropout_p=0.4),
    "block-mask": lambda: sound(
        mask=masks.compile_mask(
            masks.causal() & masks.sliding_window(9), 2, 4, 70, 90, device="cpu", block_size=32
        )
    ),
    "huge-scores": lambda: sound(scale=300.0),
    "no-lse": lambda: sound(return_lse=False),
    "decode": lambda: sound(
        query_offset=torch.tensor([3, 11], dtype=torch.int32),
        kv_lengths=torch.tensor([90, 40], dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_backend_is_within_budget(name):
    report = flashmark.check(flashmark.block_sparse_attention, **GOOD[name]())
    assert isinstance(report, flashmark.Report)
    assert report.ok and report, str(report)
    text = str(report)
    for tensor in ("query", "key", "value"):
        assert f"d {tensor}" in text
    assert "budget" in text and "error" in text
    if name == "bias-and-sinks":
        assert "d bias" in text and "d sinks" in text


def test_positional_arguments():
    query, key, value = helpers.qkv(1, 2, 20, 8, grad=False)
    report = flashmark.check(
        flashmark.block_sparse_attention, query, key, value, masks.causal(), backend="eager"
    )
    assert report.ok
    assert {row.name for row in report.rows} == {"out", "d query", "d key", "d value"}


def broken(change):
    """The operator with its result passed through `change`, under its own name."""

    @functools.wraps(flashmark.block_sparse_attention)
    def block_sparse_attention(*args, **kwargs):
        return change(*flashmark.block_sparse_attention(*args, **kwargs))

    return block_sparse_attention


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 2e-4)


def one_element(x, value):
    x = x.clone()
    x.flatten()[17] += value
    return x


FAULTS = {
    "one-wrong-output": (lambda out, lse: (one_element(out, 1e-3), lse), {"out"}),
    "nan-output": (lambda out, lse: (one_element(out, float("nan")), lse), {"out"}),
    "infinite-lse": (lambda out, lse: (out, one_element(lse, float("inf"))), {"out[1]"}),
    "biased-lse": (lambda out, lse: (out, lse * (1 + 1e-4)), {"out[1]"}),
    "wrong-gradient": (lambda out, lse: (WrongGradient.apply(out), lse), {"d value"}),
    "no-gradient": (
        lambda out, lse: (out.detach() + 0 * lse.detach().unsqueeze(-1), lse),
        {"d value"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name):
    change, rows = FAULTS[name]
    report = flashmark.check(broken(change), **sound())
    assert not report.ok and not report
    failed = {row.name for row in report.rows if not row.ok}
    assert rows <= failed, str(report)
    assert "OVER" in str(report) or "over" in str(report)


def test_half_precision_faults_are_found():
    report = flashmark.check(broken(lambda out, lse: (out * 1.05, lse)), **GOOD["bfloat16"]())
    assert not report.ok


def test_inputs_are_left_alone():
    options = sound()
    before = options["query"].detach().clone()
    flashmark.check(flashmark.block_sparse_attention, **options)
    assert torch.equal(options["query"], before) and options["query"].grad is None


def test_an_operator_without_a_reference():
    with pytest.raises(TypeError, match="op: expected .* got"):
        flashmark.check(torch.relu, torch.ones(3))


def test_no_tensor_to_check():
    with pytest.raises(TypeError):
        flashmark.check(flashmark.block_sparse_attention)


def test_show_config_names_versions_and_reasons():
    text = flashmark.show_config()
    text = text if text is not None else ""
    assert torch.__version__ in text
    for backend in ("triton", "cpu", "eager"):
        assert backend in text
    eager = [line for line in text.splitlines() if "eager" in line]
    assert eager and all("yes" in line for line in eager)
    for operator in ("block_sparse", "nystrom", "hybrid"):
        assert f"{operator} on cpu" in text
    if not torch.cuda.is_available():
        triton = [
            line for line in text.splitlines() if line.split()[:1] == ["triton"] and "no:" in line
        ]
        assert all(len(line.split("no:")[1].split()) >= 3 for line in triton)


@pytest.mark.skipif(not can_run_cpu("nystrom", torch.zeros(1)), reason="needs the C++ kernels")
def test_show_config_says_what_the_cpu_backend_leaves_to_pytorch():
    """A row of the C++ backend is a plain "yes" only where no call of it runs in PyTorch."""
    rows, operator = {}, ""
    for line in flashmark.show_config().splitlines():
        if line.endswith(" on cpu"):
            operator = line.removesuffix(" on cpu")
        elif line.split()[:1] == ["cpu"] and operator:
            rows[operator] = line.split(maxsplit=1)[1]
    assert rows["block_sparse"] == "yes"
    assert rows["nystrom"] == "yes, but is_causal=False runs in plain PyTorch"
    assert rows["hybrid"].startswith("yes")
