"""Launches of a decoding step, counted: each costs the host and the device some microseconds."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark import HybridState, NystromState
from flashmark.hybrid import call, composition
from flashmark.models import Decoder, DecoderConfig
from flashmark.nn import HybridAttention, NystromAttention, block_sparse, hybrid
from flashmark.nystrom import attention, checks
from tests.compile.driver import stub
from tests.compile.driver.counting import Count, counting

needs_stub = pytest.mark.skipif(stub.why_not() is not None, reason=str(stub.why_not()))
HALF = torch.bfloat16
MERGES = ("slots", "mass", "gate")


@pytest.fixture
def driver(monkeypatch):
    """CPU tensors stand for those of a GPU, whose values no check reads."""
    for module in (attention, checks, hybrid):
        monkeypatch.setattr(module, "readable", lambda x: False)
    with stub.launching(code=False) as library:
        yield library


def nystrom_step(normalize: str, decay: bool) -> Count:
    x, marks, core = (
        torch.zeros(2, 4, 1, 64, dtype=HALF),
        torch.zeros(4, 32, 64),
        torch.zeros(4, 32, 32),
    )
    state = NystromState.empty(2, 4, 32, 64)
    rates = torch.zeros(4, 32) if decay else None
    with counting() as count:
        flashmark.nystrom_attention(
            x, x, x, marks, core=core, decay=rates, normalize=normalize, state=state,
            state_out=state, backend="triton",
        )  # fmt: skip
    return count


def hybrid_step(merge: str, key_mask: bool) -> Count:
    x, marks = torch.zeros(2, 4, 1, 64, dtype=HALF), torch.zeros(4, 32, 64)
    options = {} if merge == "slots" else {"core": torch.zeros(4, 32, 32)}
    if merge == "gate":
        options["gate"] = torch.zeros(2, 4, 1, 1)
    if key_mask:
        options["key_mask"] = torch.ones(2, 1, dtype=torch.bool)
    state = HybridState.empty(2, 4, 32, 64, window=64, merge=merge, dtype=HALF)
    with counting() as count:
        flashmark.hybrid_attention(
            x, x, x, marks, window=64, merge=merge, state=state, state_out=state,
            backend="triton", **options,
        )  # fmt: skip
    return count


@needs_stub
@pytest.mark.parametrize("decay", [False, True], ids=["no-decay", "decay"])
@pytest.mark.parametrize(("normalize", "most"), [("landmark", 0), ("mass", 3)])
def test_a_nystrom_step_is_one_kernel(driver, normalize, most, decay):
    count = nystrom_step(normalize, decay)
    assert count.triton == {"output_kernel": 1}
    assert count.aten.total() <= most, count.aten


@needs_stub
@pytest.mark.parametrize("key_mask", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize("merge", MERGES)
def test_a_hybrid_step_is_two_kernels(driver, merge, key_mask):
    count = hybrid_step(merge, key_mask)
    assert count.triton == {"step_kernel": 1, "advance_kernel": 1}
    assert not count.aten


MODULES = {"nystrom": lambda: NystromAttention(128, 2, 16, decay=True)} | {
    merge: lambda merge=merge: HybridAttention(128, 2, 16, window=32, merge=merge, rotary=1e4)
    for merge in MERGES
}


def module_step(name: str, masked: bool, guard, monkeypatch) -> Count:
    """The second of two steps of a module; the first makes what its cache keeps."""
    for module in (attention, call):
        monkeypatch.setattr(module, "choose_backend", lambda *args, **options: "triton")
    module = MODULES[name]().eval().to(HALF)
    with guard():
        x = torch.zeros(2, 1, 128, dtype=HALF)
        mask = torch.ones(2, 1, dtype=torch.bool) if masked else None
        cache = module.init_cache(2)
        module(x, cache=cache)
        with counting() as count:
            module(x, key_mask=mask, cache=cache)
    return count


# operators around the attention: projections, decay, the rotary embedding, the gate, the cache
AROUND = {"nystrom": (4, 19), "slots": (35, 39), "mass": (35, 39), "gate": (37, 41)}


@needs_stub
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", MODULES)
def test_a_step_of_a_module(driver, name, masked, monkeypatch):
    count = module_step(name, masked, torch.no_grad, monkeypatch)
    assert count.triton.total() == (1 if name == "nystrom" else 2), count.triton
    assert count.aten.total() <= AROUND[name][masked], count.aten


@needs_stub
@pytest.mark.parametrize("name", MODULES)
def test_inference_mode_launches_no_more_than_no_grad(driver, name, monkeypatch):
    plain, inference = (
        module_step(name, False, guard, monkeypatch)
        for guard in (torch.no_grad, torch.inference_mode)
    )
    assert inference.triton == plain.triton
    assert inference.aten == plain.aten


DECODERS = {
    "exact": {}, "window": {"attention": "window"}, "nystrom": {"attention": "nystrom"},
    "convolution": {"attention": "nystrom", "convolution": 3},
    "learned": {"positions": "learned", "max_length": 64},
} | {merge: {"attention": "hybrid", "merge": merge} for merge in MERGES}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_step_waits_for_the_device(name, masked, monkeypatch):
    """On tensors without values: to ask for one raises, and one made by the host is seen.

    Masks are compiled on the CPU, and what reads them does nothing.
    """
    compile_mask = block_sparse.compiled
    monkeypatch.setattr(
        block_sparse, "compiled", lambda *given: compile_mask(*given[:-1], torch.device("cpu"))
    )
    monkeypatch.setattr(block_sparse, "block_sparse_attention", lambda q, *_, **options: q)
    monkeypatch.setattr(
        composition, "_softmax", lambda far, near, layout, q, *_: (q, q[..., 0].float())
    )
    config = DecoderConfig(
        vocab_size=37, width=64, layers=2, heads=2, landmarks=8, window=8, **DECODERS[name]
    )
    device = torch.device("meta")
    decoder = Decoder(config).eval().to(device)
    token = torch.zeros(3, 1, dtype=torch.long, device=device)
    mask = torch.ones(3, 1, dtype=torch.bool, device=device) if masked else None
    with torch.no_grad():
        cache = decoder.init_cache(3, 32)
        decoder(torch.zeros(3, 5, dtype=torch.long, device=device), cache=cache)
        decoder(token, key_mask=mask, cache=cache)  # makes what a cache keeps
        with Count() as count:
            decoder(token, key_mask=mask, cache=cache)
    assert count.aten.total() > 0
    assert not {"_local_scalar_dense", "lift_fresh", "lift_fresh_copy"} & count.aten.keys()
