"""Suite `accuracy`: every operator and dtype, outputs and gradients, compared with float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

import flashmark
from bench.compare import Job, Row, Settings, errors_of, reported, verdict
from bench.peers import dtype_name
from flashmark import masks

LENGTHS = (1, 127, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accuracy(settings: Settings) -> Iterator[Job]:
    """Largest error of each result, as a multiple of the allowed error; no times."""
    lengths = settings.lengths or LENGTHS[: 2 if settings.quick else None]
    for dtype in settings.dtypes or DTYPES:
        for n in lengths:
            for name, case in CASES.items():
                title = f"accuracy of {name}, N={n}, {dtype_name(dtype)}"
                run = functools.partial(_run, name, case, n, dtype, settings)
                yield Job(title, 1, run)


def _run(name: str, case: Callable, n: int, dtype: torch.dtype, settings: Settings, step) -> list:
    backend = "triton" if settings.on_gpu else "auto"
    row: Row = {
        "suite": f"accuracy {case.operator.__name__.removesuffix('_attention')}",
        "case": name,
        "n": n,
        "dim": case.dim,
        "dtype": dtype_name(dtype),
        "direction": "forward+backward",
        "contender": f"flashmark {backend}",
    }
    generator = torch.Generator(settings.device).manual_seed(n)
    make = functools.partial(torch.randn, generator=generator, device=settings.device)
    query = make(2, 4, n, case.dim).to(dtype)
    key, value = (make(2, 2, n, case.dim).to(dtype) for _ in range(2))
    with reported(row):
        report = flashmark.check(
            case.operator, query, key, value, *case.more(generator), backend=backend,
            **case.options,
        )  # fmt: skip
        row |= {"status": "ok"} | verdict(errors_of(report))
    step()
    return [row]


@dataclasses.dataclass(frozen=True)
class _Case:
    """An operator, a head dimension, its arguments after query, key and value, and options."""

    operator: Callable
    dim: int
    more: Callable
    options: dict


def _exact(mask: masks.Mask | None, dim: int = 64, **options) -> _Case:
    more = () if mask is None else (mask,)
    return _Case(flashmark.block_sparse_attention, dim, lambda generator: more, options)


def _landmarks(count: int, dim: int = 64, **options) -> _Case:
    def more(generator):
        device = generator.device
        return (flashmark.init_landmarks(2, count, dim, generator=generator, device=device),)

    return _Case(flashmark.nystrom_attention, dim, more, options)


_WINDOW = masks.causal() & masks.sliding_window(100)
CASES = {
    "causal D=64": _exact(masks.causal()),
    "causal D=128": _exact(masks.causal(), 128),
    "window": _exact(_WINDOW),
    "window, deterministic": _exact(_WINDOW, deterministic=True),
    "softcap": _exact(masks.causal(), softcap=20.0),
    "dropout": _exact(masks.causal(), dropout_p=0.2, dropout_seed=5),
    "everything visible": _exact(None, 80),
    "M=64": _landmarks(64),
    "M=32 D=128": _landmarks(32, 128),
    "M=128": _landmarks(128),
    "mass": _landmarks(32, normalize="mass"),
    "not causal": _landmarks(64, is_causal=False),
}
