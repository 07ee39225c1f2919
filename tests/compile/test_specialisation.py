"""A kernel is compiled once for a kind of call: no length, batch or mask compiles it again."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import pytest
import torch

from bench.offline import compiling_for
from flashmark import masks
from flashmark.block_sparse.call import Call
from flashmark.kernels import block_sparse, hybrid, nystrom, routed
from flashmark.kernels.hybrid import configs as hybrid_configs
from flashmark.kernels.hybrid import mass
from flashmark.kernels.nystrom import configs as nystrom_configs
from flashmark.nystrom.call import Call as NystromCall
from flashmark.routed.call import Call as RoutedCall

# multiples of 16 and not, one slot to a program and several
SIZES = [(2, 1024), (2, 1037), (3, 1600), (1, 4100), (16, 1008)]
# a row is merged from so many parts, to a power of two; one offset serves all samples, or does not
DECODE_SIZES = [(2, 1024), (2, 1037), (3, 1100)]
HEADS, DIM, MARKS = 4, 32, 32


def tokens(batch: int, length: int, heads: int = HEADS) -> torch.Tensor:
    return torch.zeros(batch, heads, length, DIM, dtype=torch.bfloat16)


def exact(batch: int, length: int, expression, deterministic: bool = True, bias: bool = False):
    query = tokens(batch, length)
    mask = masks.compile_mask(expression, batch, HEADS, length, length, device="cpu")
    relative = torch.zeros(HEADS, 2 * length - 1) if bias else None
    call = Call(query, query, query, mask, 0.125, bias=relative, deterministic=deterministic)
    saved = block_sparse.forward(call)
    block_sparse.backward(call, saved, saved.out, None)


def decode(batch: int, length: int):
    mask = masks.compile_mask(masks.causal(), 1, 1, length, length, device="cpu")
    offset = torch.full((batch,), length - 1, dtype=torch.int32)
    cache = tokens(batch, length)
    query = tokens(batch, 1)
    block_sparse.forward(
        Call(query, cache, cache, mask, 0.125, query_offset=offset, kv_lengths=offset + 1)
    )


def landmark(
    batch: int, length: int, *, causal: bool = True, packed: bool = False,
    mass: bool = False,
):  # fmt: skip
    batch = 1 if packed else batch
    bounds = torch.tensor([0, 100, length], dtype=torch.int32) if packed else None
    query, parameters = tokens(batch, length), torch.zeros(HEADS, MARKS, DIM)
    core = torch.zeros(HEADS, MARKS, MARKS)
    call = NystromCall(
        query, query, query, parameters, parameters, core, 0.125, cu_seqlens=bounds, mass=mass,
        is_causal=causal,
    )  # fmt: skip
    saved = nystrom.forward(call)
    nystrom.backward(call, saved, saved.out, None, None)


def step(batch: int, length: int):
    query, parameters = tokens(batch, 1 + length % 16), torch.zeros(HEADS, MARKS, DIM)
    L = torch.zeros(batch, HEADS, MARKS)
    core, R = torch.zeros(HEADS, MARKS, MARKS), torch.zeros(batch, HEADS, MARKS, DIM)
    marks = parameters, parameters, core
    nystrom.forward(NystromCall(query, query, query, *marks, 0.125, L0=L, R0=R))


def chunks(batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch, HEADS, length // 128, 128, DIM, dtype=torch.bfloat16)


def slots(batch: int, length: int):
    key, landmarks = chunks(batch, length), torch.zeros(HEADS, MARKS, DIM)
    call = key, key, landmarks, None, 0.125
    hybrid.sums_backward(*hybrid.sums_forward(*call), *call)


def masses(batch: int, length: int):
    query, landmarks = chunks(batch, length), torch.zeros(HEADS, MARKS, DIM)
    L = torch.zeros(*query.shape[:3], MARKS)
    core, R = torch.zeros(HEADS, MARKS, MARKS), torch.zeros(*L.shape, DIM)
    call = query, landmarks, core, L, R, 0.125
    numerator, read, _ = mass.forward(*call)
    mass.backward(numerator, read, *call)


def chosen(batch: int, length: int, *, packed: bool = False, deterministic: bool = True):
    query = tokens(batch, length)
    starts = torch.zeros(length, dtype=torch.int32) if packed else None
    top = 3 + length % 16  # fewer blocks to choose from give a narrower choice
    indices = torch.zeros(batch, HEADS, length, top, dtype=torch.int32)
    call = RoutedCall(
        query, query, query, indices, 64, 1, 0.125, starts=starts, deterministic=deterministic
    )
    saved = routed.forward(call)
    routed.backward(call, saved, saved.out, None)


def chosen_step(batch: int, length: int):
    cache, query = tokens(batch, length), tokens(batch, 1)
    indices = torch.zeros(batch, HEADS, 1, 6 + length % 2, dtype=torch.int32)
    routed.forward(RoutedCall(query, cache, cache, indices, 64, 1, 0.125))


CALLS: dict[str, Callable] = {
    "causal": lambda *size: exact(*size, masks.causal()),
    "mask": lambda *size: exact(*size, masks.causal() & masks.sliding_window(300)),
    "mask-one-pass": lambda *size: exact(*size, masks.prefix(100), deterministic=False),
    "relative-bias": lambda *size: exact(*size, masks.causal(), bias=True),
    "decode": decode,
    "nystrom": landmark,
    "nystrom-mass": lambda *size: landmark(*size, mass=True),
    "nystrom-packed": lambda *size: landmark(*size, packed=True),
    "nystrom-bidirectional": lambda *size: landmark(*size, causal=False),
    "nystrom-decode": step,
    "hybrid-slots": slots,
    "hybrid-mass": masses,
    "routed": chosen,
    "routed-packed": lambda *size: chosen(*size, packed=True),
    "routed-atomic": lambda *size: chosen(*size, deterministic=False),
    "routed-decode": chosen_step,
}


@pytest.mark.parametrize("name", CALLS)
def test_another_size_compiles_nothing(name, asked, monkeypatch):
    for configs in (nystrom_configs, hybrid_configs):
        monkeypatch.setattr(configs, "PROGRAMS", 8)
    known: set[tuple[str, str]] = set()
    for size in DECODE_SIZES if name in ("decode", "routed-decode") else SIZES:
        asked.clear()
        with compiling_for(90):
            CALLS[name](*size)
        assert not known or set(asked) <= known, sorted({kernel for kernel, _ in asked})
        known |= set(asked)
    assert known


def test_another_mask_compiles_nothing(asked):
    seen = []
    for expression, n in (
        (masks.sliding_window(100), 512),
        (masks.sliding_window(300, 7), 1000),
        (masks.causal() & masks.dilated(5), 777),
        (masks.dense(torch.rand(640, 640) < 0.01), 640),
    ):
        asked.clear()
        with compiling_for(90):
            exact(2, n, expression)
        seen.append(set(asked))
    assert len(seen[0]) == 4
    assert all(kernels == seen[0] for kernels in seen)


def nested() -> list[type]:
    """Tuples of a kernel's arguments that hold tuples of integers."""
    found = {
        member
        for package in (block_sparse, hybrid, nystrom, routed)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        for _, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if issubclass(member, tuple) and not member.__name__.startswith("_")
        if any("tuple[int" in str(kind) for kind in member.__annotations__.values())
    }
    return sorted(found, key=lambda member: (member.__module__, member.__name__))


@pytest.mark.parametrize("arguments", nested(), ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_a_stride_of_one_reaches_the_kernel(arguments):
    """Triton 3.6.0 takes the 1 of an inner tuple for None unless a None ends the outer one."""
    assert arguments._fields[-1] == "end"
    assert arguments._field_defaults["end"] is None
