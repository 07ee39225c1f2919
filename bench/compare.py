"""One comparison: prepares contenders, checks them, measures memory and time: CSV rows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import flashmark
from bench.peers import Unavailable
from bench.timing import Run, interleaved, peak_memory

Row = dict[str, object]
# Makes a contender ready: the function to time, and columns ("status" where its check failed).
Prepare = Callable[[], tuple[Run, Row]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Choices of the command line; empty tuples stand for a suite's own choice."""

    device: torch.device
    rounds: int
    quick: bool
    patterns: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def choose_lengths(self, *, cpu: tuple[int, ...], gpu: tuple[int, ...]) -> tuple[int, ...]:
        return self.lengths or ((1024,) if self.quick else gpu if self.on_gpu else cpu)


@dataclasses.dataclass(frozen=True)
class Job:
    """`run` calls `step` after each of its `steps` parts."""

    title: str
    steps: int
    run: Callable[[Callable[[], object]], list[Row]]


@contextlib.contextmanager
def reported(row: Row) -> Iterator[None]:
    """Record an error in the row of the run that raised it, and let the other rows go on."""
    try:
        yield
    except (Unavailable, flashmark.BackendUnavailable) as reason:
        row |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        row |= {"status": "wrong", "reason": f"{type(error).__name__}: {error}"[:200]}


def compare(
    title: str,
    common: Row,
    contenders: dict[str, Prepare],
    device: torch.device,
    rounds: int,
    *,
    budget: float = math.inf,
    ahead: bool = True,
) -> Job:
    """Time the contenders that passed their checks. A column "flops" becomes "tflops".

    No round starts once `budget` seconds are spent on rounds, the first excepted. `ahead` as
    `interleaved`.
    """
    steps = len(contenders) * (1 + rounds)

    def run(step: Callable[[], object]) -> list[Row]:
        rows, runs, left = {}, {}, steps

        def each():
            nonlocal left
            left -= 1
            step()

        for name, prepare in contenders.items():
            rows[name] = row = common | {"contender": name, "status": "ok"}
            with reported(row):
                work, columns = prepare()
                row |= columns
                if row["status"] == "ok":
                    work()
                    row["peak_bytes"] = peak_memory(work, device)
                    runs[name] = work
            each()
        timed = {}
        if runs:
            timed = interleaved(runs, device, rounds=rounds, budget=budget, each=each, ahead=ahead)
        for name, spread in timed.items():
            rows[name] |= {f"{p}_ms": round(ms, 4) for p, ms in spread._asdict().items()}
            if "flops" in rows[name]:
                rows[name]["tflops"] = round(rows[name].pop("flops") / spread.p50 / 1e9, 4)
        for _ in range(left):
            step()
        return list(rows.values())

    return Job(title, steps, run)


def forward_and_backward(
    op: Callable, inputs: Sequence[Tensor], dout: Tensor, backward: bool
) -> Run:
    """Timed run of op(*inputs), without a gradient or with the gradients of all inputs."""

    def forward():
        with torch.no_grad():
            return op(*inputs)

    def both():
        return torch.autograd.grad(op(*inputs), inputs, dout)

    return both if backward else forward


def errors_of(report: flashmark.Report) -> dict[str, tuple[float, float]]:
    """(error, allowed) of each result that `flashmark.check` compared."""
    return {row.name: (row.error, row.budget) for row in report.rows}


def verdict(errors: dict[str, tuple[float, float]]) -> Row:
    """From (error, allowed) of each result: the one that uses most of its budget, red if over."""
    name = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    error, allowed = errors[name]
    row = {"error": error, "error_allowed": allowed, "error_of": name}
    if any(not error <= allowed for error, allowed in errors.values()):
        row |= {"status": "wrong", "reason": f"error of {name} {error:.1e}, allowed {allowed:.1e}"}
    return row
