"""A remembered description of a call is the one that a first call would get."""

from __future__ import annotations

import contextlib

import pytest
import torch

from flashmark import masks
from flashmark.block_sparse.call import Call
from flashmark.kernels.block_sparse import arguments, configs, decode, passes

REMEMBERED = (
    arguments._fixed,
    passes._over_queries,
    passes._over_keys,
    configs._chosen,
    decode.plan,
)


CAUSAL, WINDOW = masks.causal(), masks.sliding_window(70)


def make(length=200, *, kv_heads=2, dtype=torch.float32, mask=CAUSAL, **options) -> Call:
    query = torch.zeros(1, 4, length, 64, dtype=dtype)
    key = torch.zeros(1, kv_heads, length, 64, dtype=dtype)
    mask = masks.compile_mask(mask, 1, 4, length, length, device="cpu")
    return Call(query, key, key, mask, options.pop("scale", 0.125), **options)


CALLS = {
    "plain": make(),
    "length": make(201),
    "groups": make(kv_heads=1),
    "half": make(dtype=torch.bfloat16),
    "window": make(mask=WINDOW),
    "mask-of-heads": make(mask=masks.dense(torch.ones(4, 200, 200, dtype=torch.bool).tril())),
    "scale": make(scale=0.5),
    "negative-scale": make(scale=-0.125),
    "softcap": make(softcap=30.0),
    "dropout": make(dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64)),
    "more-dropout": make(dropout_p=0.2, dropout_seed=torch.zeros(1, dtype=torch.int64)),
    "relative": make(bias=torch.zeros(4, 399)),
    "dense": make(bias=torch.zeros(1, 4, 200, 200)),
    "dense-transposed": make(bias=torch.zeros(1, 4, 200, 200).mT),
    "dense-of-keys": make(bias=torch.zeros(1, 4, 1, 200)),
    "offset": make(query_offset=torch.zeros(1, dtype=torch.int32)),
    "lengths": make(kv_lengths=torch.zeros(1, dtype=torch.int32)),
    "lengths-window": make(kv_lengths=torch.zeros(1, dtype=torch.int32), mask=WINDOW),
}
SETTINGS = {"ieee": None, "tf32": None, "in-use": configs.Config(32, 32, 4, 1)}


@contextlib.contextmanager
def setting(name: str):
    """A setting of the process that a launch depends on."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with contextlib.ExitStack() as stack:
            if config := SETTINGS[name]:
                passes = dict.fromkeys(configs.PASSES, config)
                stack.enter_context(configs.using(**passes))
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def launches(call: Call) -> list:
    """Sizes, features and config of each pass over a call, and its numbers."""
    described = arguments.describe(call)
    numbers = [x for x in described.modifiers if not isinstance(x, torch.Tensor)]
    found: list = [numbers]
    for pass_ in ("forward", "backward_q", "decode"):
        config = passes.choose_config(pass_, call.query, described)
        found += [config, passes.over_queries(described, call.mask, call.query, config)]
        lines = (call.mask.batch, call.mask.heads)
        found += [decode.plan(described.sizes, described.features, 1, 2, lines, config)]
    for pass_ in configs.KEY_PASSES:
        config, atomic = passes.choose_config(pass_, call.key, described), "fused" in pass_
        keys = passes.over_keys(described, call.mask, call.query, config, atomic=atomic)
        found += [config, keys]
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_each_call_is_launched_as_a_first_one(name):
    with setting(name):
        first = {}
        for key, call in CALLS.items():
            for remembered in REMEMBERED:
                remembered.cache_clear()
            first[key] = launches(call)
    for other in SETTINGS:
        with setting(other):
            for call in CALLS.values():
                launches(call)
    with setting(name):
        assert {key: launches(call) for key, call in CALLS.items()} == first


def test_calls_of_one_kind_are_described_once():
    arguments._fixed.cache_clear()
    for _ in range(3):
        arguments.describe(make())
    assert arguments._fixed.cache_info().misses == 1
