"""Calls that between them run every kernel: each returns its error and PyTorch's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch

import flashmark
from flashmark import block_topk_attention, hybrid_attention, masks, nystrom_attention
from flashmark.kernels import routed as routed_kernels
from tests import helpers
from tests.helpers import relative_error
from tests.hybrid.cases import MERGES, detached, tokens
from tests.hybrid.cases import Case as HybridCase
from tests.interpreter.attention_cases import Call, Case
from tests.interpreter.routed_cases import Call as RoutedCall
from tests.interpreter.routed_cases import Case as RoutedCase
from tests.nystrom.cases import Case as NystromCase

from . import cuda_calls

HALF = torch.bfloat16
WINDOW = masks.causal() & masks.sliding_window(90)
PLAIN = Case(mask=WINDOW, kv_heads=1, q_len=150, dim=64, block=64, dtype=HALF)
EXACT = {
    "causal": dataclasses.replace(PLAIN, mask=masks.causal()),
    "window": PLAIN,
    "window, D=128": dataclasses.replace(PLAIN, dim=128),
    "window, float32": dataclasses.replace(PLAIN, dtype=torch.float32, q_len=70, dim=32, block=32),
    "window, rows of 200 bytes": dataclasses.replace(PLAIN, dim=100, v_dim=64),
    "dropout": dataclasses.replace(PLAIN, dropout_p=0.2),
    "dense bias": dataclasses.replace(PLAIN, bias=(1, 2, 150, 150)),
    "relative bias": dataclasses.replace(PLAIN, bias=(2, 299)),
    "sinks, softcap": dataclasses.replace(PLAIN, sinks=True, softcap=2.0),
    "lengths": dataclasses.replace(PLAIN, kv_lengths=(140,)),
    "decode": Case(mask=masks.causal(), q_len=2, kv_len=300, rows=300, kv_heads=1, dim=64,
                   query_offset=(255,), dtype=HALF),
}  # fmt: skip
TANGENTS = {
    "window": PLAIN,
    "D=128": dataclasses.replace(PLAIN, dim=128),
    "relative bias, sinks": dataclasses.replace(PLAIN, bias=(2, 299), sinks=True),
}
WIDE = dataclasses.replace(PLAIN, dim=128, block=128)
NYSTROM = {
    "landmarks": NystromCase(150, 64, dim=64, v_dim=64),
    "decay, state": NystromCase(150, 16, decay=0.3, state=True),
    "mass": NystromCase(100, 16, normalize="mass"),
    "bidirectional": NystromCase(100, 16, is_causal=False),
    "decode": NystromCase(1, 16, group=4, state=True),
}
HYBRID = {
    "slots": HybridCase(50, 16, 16, group=2),
    "gate": HybridCase(30, 10, 5, "gate", group=2),
    "mass": HybridCase(50, 16, 8, "mass", group=2),
}
Errors = tuple[float, float]  # of a result, against float64: ours, and PyTorch's


def calls(arch: int) -> dict[str, Callable[[], Errors]]:
    """Calls by family and feature."""
    found: dict[str, Callable[[], Errors]] = {}
    for name, case in EXACT.items():
        found[f"block-sparse: {name}"] = functools.partial(block_sparse, case)
    for name, case in TANGENTS.items():
        found[f"block-sparse: forward mode, {name}"] = functools.partial(tangents, case)
    if arch == 90:
        found["block-sparse: window, D=128, Gluon"] = functools.partial(block_sparse, WIDE)
    for name, case in NYSTROM.items():
        found[f"Nyström: {name}"] = functools.partial(_nystrom, case)
    for name, case in HYBRID.items():
        found[f"hybrid: {name}"] = functools.partial(_hybrid, case)
    found["hybrid: decode"] = hybrid_steps
    for deterministic in (True, False):
        form = "deterministic" if deterministic else "atomics"
        found[f"routed: chosen blocks, {form}"] = functools.partial(routed, deterministic)
    found["routed: decode"] = routed_decode
    if arch == 90:
        for name, run in cuda_calls.CALLS.items():
            found[f"CUDA C++: {name}"] = run
    return found


def _nystrom(case: NystromCase) -> Errors:
    return operator(nystrom_attention, case.arguments(HALF))


def _hybrid(case: HybridCase) -> Errors:
    return operator(hybrid_attention, case.arguments(HALF))


def hybrid_steps() -> Errors:
    """Outputs of tokens that come one a call, for each merge."""
    errors = []
    for merge in MERGES:
        case = HybridCase(9, 3, 5, merge, group=2)
        arguments, state = detached(case.arguments(HALF)), case.empty_state(HALF)
        outs = []
        for i in range(case.n):
            part = tokens(arguments, slice(i, i + 1))
            outs.append(hybrid_attention(**part, state=state, state_out=state, backend="triton"))
        exact = {n: x.double() if torch.is_tensor(x) else x for n, x in arguments.items()}
        wanted = hybrid_attention(**exact, backend="reference")
        plain = hybrid_attention(**arguments, backend="reference")
        ours = torch.cat(outs, 2)
        errors.append((relative_error(ours, wanted), relative_error(plain, wanted)))
    return _worst(errors)


def routed_decode() -> Errors:
    """Outputs of two queries after 128 keys."""
    case = RoutedCase(heads=4, q_len=2, kv_len=130, dim=64, block=32, dtype=HALF)
    call = RoutedCall(case, torch.device("cpu"))
    return _compare(call, routed_kernels.forward(call.checked())._asdict().items())


def routed(deterministic: bool) -> Errors:
    """Attention over blocks that every query chose at random among those before its own."""
    n, block, draw = 130, 32, np.random.default_rng(0)
    indices = torch.full((1, 1, n, 2), -1, dtype=torch.int32)
    for i in range(2 * block, n):
        indices[0, 0, i] = torch.from_numpy(draw.permutation(i // block)[:2])
    query, key, value = helpers.qkv(1, 4, n, 64, kv_heads=1, dtype=HALF)
    arguments = {"query": query, "key": key, "value": value, "indices": indices}
    return operator(
        block_topk_attention,
        arguments | {"block_size": block, "near": 0, "deterministic": deterministic},
    )


def block_sparse(case: Case) -> Errors:
    """Outputs of the kernels, and their gradients by the two-pass and the one-pass form."""
    call = Call(case, torch.device("cpu"))
    out, lse = call.forward()
    got = [("out", out), ("lse", lse)]
    if case.query_offset is None:
        for deterministic in (True, False):
            got += call.backward(out, lse, deterministic).items()
    return _compare(call, got)


def tangents(case: Case) -> Errors:
    """Outputs and their tangents, in forward mode."""
    call = Call(case, torch.device("cpu"))
    along = call.directions()
    wanted, plain = call.reference_jvp(along), call.reference_jvp(along, case.dtype)
    return _worst(
        (relative_error(x, wanted[name]), relative_error(plain[name], wanted[name]))
        for name, x in call.jvp(along).items()
    )


def _compare(call: Call | RoutedCall, got: Iterable[tuple[str, torch.Tensor]]) -> Errors:
    wanted, plain = call.reference(), call.reference(call.case.dtype)
    return _worst(
        (relative_error(tensor, wanted[name]), relative_error(plain[name], wanted[name]))
        for name, tensor in got
    )


def operator(function, arguments: dict) -> Errors:
    """Outputs and gradients of a public operator."""
    run = functools.wraps(function)(functools.partial(function, backend="triton"))
    eps = torch.finfo(HALF).eps
    torch.manual_seed(0)  # the cotangents
    report = flashmark.check(run, **arguments)
    # a budget is twice PyTorch's error, and two rounding units
    return _worst((row.error, row.budget / 2 - eps) for row in report.rows)


def _worst(errors: Iterable[Errors]) -> Errors:
    """Errors of the result where ours is largest beside PyTorch's."""
    return max(errors, key=lambda pair: pair[0] / (pair[1] + torch.finfo(HALF).eps / 2))
