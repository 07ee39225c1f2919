"""Suite `nystrom`: causal attention through landmarks, against PyTorch's exact causal attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import flashmark
from bench.compare import (
    Job,
    Prepare,
    Settings,
    compare,
    errors_of,
    forward_and_backward,
    verdict,
)
from bench.landmark_peers import PEERS
from bench.masks import attention_contender
from bench.oracle import Oracle, relative_error
from bench.patterns import PATTERNS
from bench.peers import Contender, Unavailable, Work, contenders, first_line

MOST_IN_FLOAT64 = 65536  # tokens; longer ones are checked on their first 600
PEER_BUDGET = 5e-2
NAMES = ("query", "key", "value", "landmarks")


def nystrom(settings: Settings) -> Iterator[Job]:
    """Forward and forward + backward, the gradient of the landmarks included."""
    gpu = tuple(2**n for n in range(12, 21, 2))
    lengths = settings.choose_lengths(cpu=(16384, 32768), gpu=gpu)
    batch, heads = (1, 16) if settings.on_gpu else (1, 8)
    dtypes = (torch.bfloat16,) if settings.on_gpu else (torch.float32,)
    for dtype in settings.dtypes or dtypes:
        for n in lengths:
            pattern = PATTERNS["causal"](n, settings.device)
            marks = (32, 64, 128) if settings.on_gpu and n == 65536 else (64,)
            for backward, count in itertools.product((False, True), marks):
                work = Work(
                    pattern, batch, heads, n, 64, dtype, settings.device, backward, landmarks=count
                )
                yield _job(work, settings)


def _job(work: Work, settings: Settings) -> Job:
    case = f"Nyström M={work.landmarks}"
    truth = functools.cache(lambda: float64(work))
    ready = {
        f"flashmark {name}": nystrom_contender(name, work, truth)
        for name in (("triton",) if settings.on_gpu else ("eager", "cpu"))
    }
    oracle = functools.cache(lambda: Oracle(work))
    for peer in contenders(work.device):
        if peer.name.startswith("sdpa"):
            ready[peer.name] = _quadratic(peer, work, oracle)
    if settings.on_gpu:
        for name, (make, same) in PEERS.items():
            ready[name] = _peer(make, work, truth if same else None)
    columns = work.columns("nystrom", case)
    return compare(work.title(case), columns, ready, work.device, settings.rounds)


def _quadratic(peer: Contender, work: Work, oracle: Callable[[], Oracle]) -> Prepare:
    """Exact attention, at lengths where it takes a few minutes at most."""
    limit = 65536 if work.device.type == "cuda" else 16384
    prepare = attention_contender(peer, work, oracle)

    def up_to_the_limit():
        if work.n > limit:
            raise Unavailable(f"quadratic: left out beyond N={limit}")
        return prepare()

    return up_to_the_limit


def nystrom_contender(backend: str, work: Work, truth: Callable[[], dict[str, Tensor]]) -> Prepare:
    """Compare with the dense definition on a short sequence, and with `truth` at full size."""
    op = functools.partial(flashmark.nystrom_attention, backend=backend)

    def prepare():
        errors = _errors_of_a_small_one(work, backend)
        inputs, dout = nystrom_inputs(work)
        budgets = {name: allowed for name, (_, allowed) in errors.items()}
        if work.n <= MOST_IN_FLOAT64:
            for name, result in _results(op, inputs, dout, work.backward).items():
                errors[f"{name} at full size"] = (
                    relative_error(result, truth()[name]), budgets[name],
                )  # fmt: skip
        return forward_and_backward(op, inputs, dout, work.backward), verdict(errors)

    return prepare


def _peer(make: Callable, work: Work, truth: Callable[[], dict[str, Tensor]] | None) -> Prepare:
    """Another library's attention, compared with ours in float64 where the function is the same."""

    def prepare():
        op = make(work)
        inputs, dout = nystrom_inputs(work)
        try:
            results = _results(op, inputs, dout, work.backward)
        except Exception as error:  # its kernels may not compile here
            raise Unavailable(first_line(error)) from error
        columns = {}
        if truth and work.n <= MOST_IN_FLOAT64:
            columns = verdict({
                name: (relative_error(result, truth()[name]), PEER_BUDGET)
                for name, result in results.items()
            })  # fmt: skip
        return forward_and_backward(op, inputs, dout, work.backward), columns

    return prepare


def _errors_of_a_small_one(work: Work, backend: str) -> dict[str, tuple[float, float]]:
    """Errors against the dense definition (quadratic memory) on the first 600 tokens."""
    inputs, _ = nystrom_inputs(work)
    small = [x[:, :2, :600] for x in inputs[:3]]
    report = flashmark.check(flashmark.nystrom_attention, *small, inputs[3][:2], backend=backend)
    return errors_of(report)


def nystrom_inputs(work: Work) -> tuple[tuple[Tensor, ...], Tensor]:
    """(query, key, value, landmarks) and the gradient of the output."""
    query, key, value = work.inputs()
    generator = torch.Generator(work.device).manual_seed(2)
    make = functools.partial(torch.randn, generator=generator, device=work.device)
    landmarks = flashmark.init_landmarks(
        work.heads, work.landmarks, work.dim, generator=generator, device=work.device
    )
    dout = make(work.batch, work.heads, work.n, work.dim).to(work.dtype)
    return (query, key, value, landmarks.requires_grad_(work.backward)), dout


def _results(op, inputs, dout: Tensor, backward: bool) -> dict[str, Tensor]:
    if not backward:
        with torch.no_grad():
            return {"out": op(*inputs)}
    out = op(*inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    return {"out": out.detach()} | {f"d {n}": g for n, g in zip(NAMES, grads, strict=True)}


def float64(work: Work) -> dict[str, Tensor]:
    """The tiled backend in float64, itself compared with the dense definition on small inputs."""
    inputs, dout = nystrom_inputs(work)
    inputs = [x.detach().double().requires_grad_(work.backward) for x in inputs]
    op = functools.partial(flashmark.nystrom_attention, backend="eager")
    return _results(op, inputs, dout.double(), work.backward)
