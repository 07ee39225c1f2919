"""Wrong arguments to block_sparse_attention: one sentence, argument, expected, got."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import flashmark
from flashmark import masks


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def compiled(q_len=8, kv_len=8, batch=2, heads=4, mask=None):
    mask = masks.causal() if mask is None else mask
    return masks.compile_mask(mask, batch, heads, q_len, kv_len, device="cpu", block_size=16)


PER_HEAD = masks.mask_mod(lambda b, h, q, kv: q >= kv + h)
PER_SAMPLE = masks.mask_mod(lambda b, h, q, kv: q >= kv + b)

# id: (arguments that differ from a good call, error, pattern)
BAD = {
    "query-3d": ({"query": tensor(4, 8, 16)}, ValueError, r"query.*\(4, 8, 16\)"),
    "key-5d": ({"key": tensor(1, 2, 4, 8, 16)}, ValueError, "key"),
    "value-2d": ({"value": tensor(8, 16)}, ValueError, r"value.*\(8, 16\)"),
    "query-list": ({"query": [1.0]}, TypeError, "query.*list"),
    "value-none": ({"value": None}, TypeError, "value.*NoneType"),
    "query-int": ({"query": tensor(2, 4, 8, 16, dtype=torch.int64)}, TypeError, "query.*int64"),
    "key-dtype": (
        {"key": tensor(2, 2, 8, 16, dtype=torch.float16)},
        TypeError,
        "key.*float32.*float16",
    ),
    "value-dtype": (
        {"value": tensor(2, 2, 8, 16, dtype=torch.float64)},
        TypeError,
        "value.*float32.*float64",
    ),
    "key-device": ({"key": tensor(2, 2, 8, 16, device="meta")}, ValueError, "key.*cpu.*meta"),
    "value-device": ({"value": tensor(2, 2, 8, 16, device="meta")}, ValueError, "value.*cpu.*meta"),
    "head-ratio": (
        {"key": tensor(2, 3, 8, 16), "value": tensor(2, 3, 8, 16)},
        ValueError,
        "(heads|multiple|divi).*3",
    ),
    "more-kv-heads": (
        {"key": tensor(2, 8, 8, 16), "value": tensor(2, 8, 8, 16)},
        ValueError,
        "multiple|heads",
    ),
    "key-batch": ({"key": tensor(1, 2, 8, 16)}, ValueError, "key.*2.*1"),
    "key-dim": ({"key": tensor(2, 2, 8, 24)}, ValueError, "key.*16.*24"),
    "value-length": ({"value": tensor(2, 2, 9, 16)}, ValueError, "value.*8.*9"),
    "value-heads": ({"value": tensor(2, 4, 8, 16)}, ValueError, "value.*2.*4"),
    "dim-0": ({"query": tensor(2, 4, 8, 0), "key": tensor(2, 2, 8, 0)}, ValueError, "256.*0"),
    "dim-257": (
        {"query": tensor(2, 4, 8, 257), "key": tensor(2, 2, 8, 257)},
        ValueError,
        "256.*257",
    ),
    "v-dim-300": ({"value": tensor(2, 2, 8, 300)}, ValueError, "value.*256.*300"),
    "no-heads": ({"query": tensor(2, 0, 8, 16)}, ValueError, "query|heads"),
    "scale-nan": ({"scale": float("nan")}, ValueError, "scale.*nan"),
    "scale-inf": ({"scale": float("inf")}, ValueError, "scale.*inf"),
    "scale-string": ({"scale": "1"}, TypeError, "scale.*str"),
    "scale-tensor": ({"scale": tensor(2)}, TypeError, "scale.*Tensor"),
    "nested-key": (
        {"key": torch.nested.nested_tensor([tensor(2, 8, 16)] * 2)},
        TypeError,
        "key.*nested",
    ),
    "softcap-negative": ({"softcap": -3.0}, ValueError, "softcap.*-3"),
    "softcap-nan": ({"softcap": float("nan")}, ValueError, "softcap.*nan"),
    "dropout-1": ({"dropout_p": 1.0}, ValueError, "dropout_p.*1"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, "dropout_p.*-0.1"),
    "dropout-nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p.*nan"),
    "seed-float": ({"dropout_p": 0.5, "dropout_seed": 1.5}, TypeError, "dropout_seed.*float"),
    "seed-two": (
        {"dropout_p": 0.5, "dropout_seed": torch.tensor([1, 2])},
        ValueError,
        r"dropout_seed.*one element.*\(2,\)",
    ),
    "seed-int32": (
        {"dropout_p": 0.5, "dropout_seed": int32(1)},
        (ValueError, TypeError),
        "dropout_seed.*int64.*int32",
    ),
    "bias-1d": ({"bias": tensor(15)}, ValueError, r"bias.*\(15,\)"),
    "bias-3d": ({"bias": tensor(4, 8, 8)}, ValueError, r"bias.*\(4, 8, 8\)"),
    "bias-width": ({"bias": tensor(4, 14)}, ValueError, "bias.*15.*14"),
    "bias-heads": ({"bias": tensor(3, 15)}, ValueError, "bias.*4.*3"),
    "bias-kv-heads": ({"bias": tensor(2, 15)}, ValueError, "bias.*4.*2"),
    "bias-not-broadcastable": (
        {"bias": tensor(2, 2, 8, 8)},
        ValueError,
        r"bias.*\(2, 4, 8, 8\).*\(2, 2, 8, 8\)",
    ),
    "bias-int": ({"bias": tensor(4, 15, dtype=torch.int64)}, TypeError, "bias.*int64"),
    "bias-device": ({"bias": tensor(4, 15, device="meta")}, ValueError, "bias.*cpu.*meta"),
    "bias-float": ({"bias": 1.0}, TypeError, "bias.*float"),
    "sinks-length": ({"sinks": tensor(2)}, ValueError, r"sinks.*4.*2"),
    "sinks-2d": ({"sinks": tensor(2, 4)}, ValueError, r"sinks.*\(2, 4\)"),
    "sinks-int": ({"sinks": tensor(4, dtype=torch.int32)}, TypeError, "sinks.*int32"),
    "sinks-device": ({"sinks": tensor(4, device="meta")}, ValueError, "sinks.*cpu.*meta"),
    "kv-lengths-int": ({"kv_lengths": 5}, TypeError, "kv_lengths.*int"),
    "kv-lengths-float": ({"kv_lengths": tensor(2)}, TypeError, "kv_lengths.*int32.*float32"),
    "kv-lengths-2d": ({"kv_lengths": int32([5, 5])}, ValueError, r"kv_lengths.*\(1, 2\)"),
    "kv-lengths-batch": ({"kv_lengths": int32(5, 5, 5)}, ValueError, r"kv_lengths.*2.*3"),
    "kv-lengths-device": (
        {"kv_lengths": int32(5, 5).to("meta")},
        ValueError,
        "kv_lengths.*cpu.*meta",
    ),
    "offset-float": ({"query_offset": 1.5}, TypeError, "query_offset.*float"),
    "offset-negative": ({"query_offset": -1}, ValueError, "query_offset.*-1"),
    "offset-bool": ({"query_offset": True}, TypeError, "query_offset.*bool"),
    "offset-float-tensor": ({"query_offset": tensor(2)}, TypeError, "query_offset.*int32.*float32"),
    "offset-batch": ({"query_offset": int32(0, 0, 0)}, ValueError, "query_offset.*2.*3"),
    "offset-beyond-the-keys": ({"query_offset": 1}, ValueError, "query_offset.*1"),
    "offset-beyond-the-mask": (
        {"mask": compiled(), "query_offset": 5},
        ValueError,
        "query_offset.*5",
    ),
    "mask-string": ({"mask": "causal"}, TypeError, "mask.*str"),
    "mask-tensor": ({"mask": torch.ones(8, 8, dtype=torch.bool)}, TypeError, "tensor.*masks.dense"),
    "mask-function": ({"mask": masks.causal}, TypeError, "mask.*function"),
    "mask-q-len": ({"mask": compiled(q_len=9)}, ValueError, "mask.*8.*9"),
    "mask-kv-len": ({"mask": compiled(kv_len=9)}, ValueError, "mask.*8.*9"),
    "mask-heads": ({"mask": compiled(heads=3, mask=PER_HEAD)}, ValueError, "mask.*4.*3"),
    "mask-batch": ({"mask": compiled(batch=3, mask=PER_SAMPLE)}, ValueError, "mask.*2.*3"),
    "mask-kv-len-with-offset": (
        {"mask": compiled(9, 9), "query_offset": 0},
        ValueError,
        "mask.*8.*9",
    ),
    "expression-for-other-lengths": (
        {"mask": masks.documents(torch.zeros(9, dtype=torch.long))},
        ValueError,
        "ids.*8.*9",
    ),
    "unknown-backend": ({"backend": "cuda"}, ValueError, "backend.*triton.*eager.*cuda"),
    "backend-none": ({"backend": None}, (ValueError, TypeError), "backend.*None"),
}


def call(**changes):
    good = {
        "query": tensor(2, 4, 8, 16),
        "key": tensor(2, 2, 8, 16),
        "value": tensor(2, 2, 8, 16),
        "backend": "eager",
    }
    return flashmark.block_sparse_attention(**good | changes)


def test_the_good_call_is_good():
    assert call().shape == (2, 4, 8, 16)


@pytest.mark.parametrize(("changes", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input(changes, error, match):
    with pytest.raises(error, match=match) as caught:
        call(**changes)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert "expected" in message and "got" in message


def test_a_mask_on_another_device():
    mask = compiled(mask=masks.causal() & masks.sliding_window(3)).to("meta")
    with pytest.raises(ValueError, match="mask.*cpu.*meta"):
        call(mask=mask)


def test_misspelled_and_positional_options_are_refused():
    with pytest.raises(TypeError, match="windw"):
        call(windw=3)
    with pytest.raises(TypeError, match="positional"):
        flashmark.block_sparse_attention(*[tensor(1, 1, 2, 4)] * 3, None, 0)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs Triton kernels here"
)
def test_triton_cannot_run_on_cpu_tensors_and_says_why():
    with pytest.raises(RuntimeError, match="backend.*triton") as caught:
        call(backend="triton")
    assert isinstance(caught.value, flashmark.BackendUnavailable)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_float64_runs_on_eager_and_reference_only(backend):
    wide = dict.fromkeys(("query", "key", "value"), tensor(2, 4, 8, 16, dtype=torch.float64))
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match=backend):
        call(**wide, backend=backend)
    for backend in ("eager", "reference", "auto"):
        assert call(**wide, backend=backend).dtype == torch.float64


@pytest.mark.parametrize(
    "name", ["scale-nan", "head-ratio", "bias-width", "mask-q-len", "sinks-length", "mask-string"]
)
def test_the_reference_backend_checks_its_arguments_too(name):
    changes, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call(**changes | {"backend": "reference"})


def test_jit_trace_is_refused_in_a_sentence():
    with pytest.raises(NotImplementedError, match="torch.jit.trace.*torch.export"):
        torch.jit.trace(lambda x: flashmark.block_sparse_attention(x, x, x), tensor(1, 2, 8, 16))


INTERPRETED = """
import torch, flashmark
x = torch.zeros(1, 1, 16, 16, dtype=torch.bfloat16)
try:
    flashmark.block_sparse_attention(x, x, x, backend="triton")
except flashmark.BackendUnavailable as error:
    print(error)
"""


def test_the_interpreter_refuses_bfloat16():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert "TRITON_INTERPRET=1" in done.stdout and "bfloat16" in done.stdout, done.stderr
