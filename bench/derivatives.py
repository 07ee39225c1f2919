"""Suite `derivatives`: outputs with their tangents (`torch.func.jvp`) beside outputs alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashmark
from bench.compare import Job, Prepare, Settings, compare, verdict
from bench.oracle import relative_error
from bench.peers import Unavailable, dtype_name
from flashmark import masks

HEADS, DIM, WINDOW = 8, 64, 512
SMALL = 600  # tokens of the comparison with the definition in float64
CASES: dict[str, masks.Mask] = {
    "causal": masks.causal(),
    f"window {WINDOW}": masks.causal() & masks.sliding_window(WINDOW),
}
PARTS = ("out", "tangent")


def derivatives(settings: Settings) -> Iterator[Job]:
    """Tangents of query, key and value, and of the query alone."""
    for case in settings.patterns or CASES:
        for n in settings.choose_lengths(cpu=(1024, 4096), gpu=(4096, 16384)):
            for dtype in settings.dtypes or (torch.float32, torch.bfloat16):
                yield _job(case, n, dtype, settings)


def _job(case: str, n: int, dtype: torch.dtype, settings: Settings) -> Job:
    common = {
        "suite": "derivatives", "case": case, "batch": 1, "heads": HEADS, "n": n, "dim": DIM,
        "dtype": dtype_name(dtype), "direction": "forward mode",
    }  # fmt: skip
    generator = torch.Generator(settings.device).manual_seed(0)
    inputs = [
        torch.randn(1, HEADS, n, DIM, generator=generator, device=settings.device).to(dtype)
        for _ in range(6)
    ]
    given, along = inputs[:3], inputs[3:]
    ours = functools.partial(flashmark.block_sparse_attention, mask=CASES[case])
    contenders = {
        "forward": lambda: (lambda: ours(*given), {}),
        "jvp": _jvp(ours, given, along, 3),
        "jvp of the query": _jvp(ours, given, along, 1),
        "PyTorch's jvp": _plain(case, given, along),
    }
    title = f"{case}, N={n}, {dtype_name(dtype)}"
    return compare(title, common, contenders, settings.device, settings.rounds)


def _tangents(op: Callable, given: list[Tensor], along: list[Tensor], count: int):
    """(out, its tangent) along tangents of the first `count` inputs."""

    def of(*some: Tensor) -> Tensor:
        return op(*some, *given[count:])

    return torch.func.jvp(of, tuple(given[:count]), tuple(along[:count]))


def _jvp(op: Callable, given: list[Tensor], along: list[Tensor], count: int) -> Prepare:
    def prepare():
        small, tangents = ([x[:, :, :SMALL] for x in some] for some in (given, along))
        found = _tangents(op, small, tangents, count)
        plain = functools.partial(op, backend="reference")
        wide = [[x.double() for x in some] for some in (small, tangents)]
        wanted = _tangents(plain, *wide, count)
        if small[0].dtype == torch.float32:
            budgets = [1e-5, 5e-5]
        else:
            unit = torch.finfo(small[0].dtype).eps
            same = _tangents(plain, small, tangents, count)
            budgets = [2 * relative_error(x, y) + unit for x, y in zip(same, wanted, strict=True)]
        errors = [relative_error(x, y) for x, y in zip(found, wanted, strict=True)]
        pairs = zip(errors, budgets, strict=True)
        run = functools.partial(_tangents, op, given, along, count)
        return run, verdict(dict(zip(PARTS, pairs, strict=True)))

    return prepare


def _plain(case: str, given: list[Tensor], along: list[Tensor]) -> Prepare:
    """The one backend of PyTorch's attention that has forward mode."""

    def prepare():
        if case != "causal":
            raise Unavailable("timed without a mask tensor")
        op = functools.partial(F.scaled_dot_product_attention, is_causal=True)

        def run():
            with sdpa_kernel(SDPBackend.MATH):
                return _tangents(op, given, along, 3)

        return run, {}

    return prepare
