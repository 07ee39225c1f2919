"""Predicted time of causal Nyström attention on an H200 for M = D = 64 in bfloat16, forward and
backward, from counts of the machine code, beside its floor and others.

python -m tests.compile.nystrom_predictions writes tests/compile/nystrom_predictions.csv and prints
the tables of docs/performance.md.

A chunk's cycles are those of a turn in tests/compile/predictions.py. A launch takes its waves of
programs, or its bytes at the speed of a copy where that is longer; gaps between launches are left
out. Exact attention is the prediction for our fastest form at D = 64. `chunk_gla` is its bytes
alone, at least, without what makes its inputs.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import torch

from bench.offline import compiling_for, inspect
from flashmark.kernels.nystrom import configs
from flashmark.kernels.nystrom.arguments import Features
from tests.compile import budgets, machine_code, predictions
from tests.compile.nystrom_launches import HALF, Launch
from tests.compile.predictions import CLOCK, PROCESSORS, Kernel, Turn

TABLE = Path(__file__).with_name("nystrom_predictions.csv")
SIZE = 64  # landmarks and columns
COPY = 4.3e12  # bytes a second, measured
# cycles of a stretch, all programs of a scan side by side: docs/performance.md
SCAN, REVERSE_SCAN = 696, 496
# bytes a token and head: query, key, value, output; and all but the output twice, with dO
FLOOR = {"forward": 8 * SIZE, "backward": 14 * SIZE}
STATE = 4 * SIZE * SIZE  # bytes in float32
JOINED = 10 * 4 * SIZE  # bytes of a slot that its kernel reads and writes
# Its kernels. Forward: gates summed; keys, values, gates to states; queries, keys, gates to scores
# of a chunk; queries, values, gates, states, scores to the output. Backward: states again, in
# float32; their gradients; dV; the gradient of scores; dQ and dK within chunks, and in all; both
# rounded.
GLA = {
    "forward": SIZE * ((4 + 4) + (2 + 2 + 4 + 2) + (2 + 2 + 4 + 4) + (2 + 2 + 4 + 2 + 4 + 2)),
    "backward": SIZE * ((2 + 2 + 4 + 4) + (2 + 4 + 2 + 4) + (2 + 4 + 4 + 2 + 4 + 2) + (2 + 2 + 4)
                        + (2 + 2 + 4 + 4 + 8) + (2 + 2 + 2 + 4 + 4 + 2 + 4 + 8 + 12) + 12),
}  # fmt: skip
EXACT = {  # our fastest form, and products of its mathematics
    "forward": ("gluon-D64-causal128-bfloat16", 4),
    "backward": ("gluon-backward-D64-causal128-bfloat16", 10),
}
LENGTHS, HEADS = (4096, 65536, 1 << 20), (8, 16)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One row of the table; microseconds."""

    triton: str
    ptxas: str
    pass_: str
    heads: int
    tokens: int
    floor: int
    low: int
    predicted: int
    high: int
    exact: int
    chunk_gla: int


def kernels(pass_: str) -> dict[str, Kernel]:
    """The kernels of a call that is cut into stretches, but for small ones, compiled now and
    counted.
    """

    def counts(name: str, args: tuple) -> bool:
        features = [x for x in args if isinstance(x, Features)]
        return name not in budgets.SMALL and not features[-1].STEEP  # that one is for rises

    with compiling_for(90, counts) as launches:
        Launch(pass_, SIZE, SIZE).run()
    found = {}
    for name, compiled in launches:
        code = machine_code.disassemble(compiled.asm["cubin"])
        inner = code.product_loops()[0]
        turn, outer = Turn.of(inner.body, 1), code.around(inner)
        if outer:  # a chunk, some of its queries at a time
            more = configs.BACKWARD_SLOT // configs.BACKWARD_QUERIES - 1
            parts = zip(
                dataclasses.astuple(Turn.of(outer.body, 1)), dataclasses.astuple(turn), strict=True
            )
            turn = Turn(*(all_ + more * some for all_, some in parts))
        report = inspect(name, compiled)
        fit = min(65536 // (report.registers * report.threads), 233472 // (report.shared + 1024))
        found[name] = Kernel(turn, turn, fit, report.warps // 4, SIZE, 1, overlapped=False)
    return found


def seconds(kernel: Kernel, programs: int, chunks: int, bytes_: float, p: float) -> float:
    """Seconds of a launch of `programs` that take `chunks` each."""
    groups = min(kernel.groups, -(-programs // PROCESSORS))
    waves = max(1.0, programs / (PROCESSORS * groups))
    cycles = dataclasses.replace(kernel, groups=groups).cycles(kernel.full, p)
    return max(waves * chunks * cycles / CLOCK, bytes_ / COPY)


def forward(found: dict[str, Kernel], heads: int, tokens: int, p: float) -> float:
    """Seconds of a forward."""
    with compiling_for(90):
        span = configs.forward_span(torch.device("cpu"), heads, tokens)
    stretches = -(-tokens // span)
    programs, all_tokens = heads * stretches, heads * tokens
    chunk = {
        name: configs.choose(90, pass_, HALF, SIZE, SIZE, SIZE, tokens).chunk
        for name, pass_ in (("states_kernel", "states"), ("output_kernel", "forward"))
    }
    state = STATE * programs  # bytes of all stored states
    states = seconds(found["states_kernel"], programs, span // chunk["states_kernel"],
                     4 * SIZE * all_tokens + state, p)  # fmt: skip
    scan = max(SCAN * stretches / CLOCK, 2 * state / COPY)
    output = seconds(found["output_kernel"], programs, span // chunk["output_kernel"],
                     FLOOR["forward"] * all_tokens + state, p)  # fmt: skip
    return states + scan + output


def backward(found: dict[str, Kernel], heads: int, tokens: int, p: float) -> float:
    """Seconds of a backward. A slot's states are bfloat16: forward and reverse, a side reads or
    writes both.
    """
    with compiling_for(90):
        span, slot = configs.backward_span(torch.device("cpu"), heads, tokens, SIZE)
    stretches = -(-tokens // span)
    units = configs.stretches_of_a_program(heads * stretches)
    programs, all_tokens = heads * -(-stretches // units), heads * tokens
    state, slots = STATE * heads * stretches, STATE // 2 * heads * -(-tokens // slot)
    chunk = configs.choose(90, "states", HALF, SIZE, SIZE, SIZE, tokens).chunk
    states = seconds(found["states_kernel"], heads * stretches, span // min(chunk, slot),
                     4 * SIZE * all_tokens + state + slots, p)  # fmt: skip
    scans = sum(max(x * stretches / CLOCK, 2 * state / COPY) for x in (SCAN, REVERSE_SCAN))
    join = JOINED * heads * -(-tokens // slot) / COPY
    inputs = 8 * SIZE * all_tokens + 2 * state + 2 * slots
    sides = (
        seconds(found[name], programs, units * span // slot,
                inputs + results * 2 * SIZE * all_tokens + shares * STATE * programs, p)
        for name, results, shares in (("rows_kernel", 1, 2), ("keys_kernel", 2, 1))
    )  # fmt: skip
    return states + scans + join + sum(sides)


def predict() -> list[Prediction]:
    """All rows, for the versions of Triton and ptxas that are here."""
    tools, rows = budgets.tools(), []
    for pass_, time in (("forward", forward), ("backward", backward)):
        found = kernels(pass_)
        form, products = EXACT[pass_]
        known = predictions.table()[(*tools, "causal 16k", form)]
        for heads in HEADS:
            for tokens in LENGTHS:
                times = [time(found, heads, tokens, p) for p in reversed(predictions.EXPONENTS)]
                exact = products / 2 * SIZE * heads * tokens**2 / (known.predicted * 1e12)
                floor, gla = (heads * tokens * n[pass_] / COPY for n in (FLOOR, GLA))
                rows.append(Prediction(*tools, pass_, heads, tokens,
                    *(round(1e6 * x) for x in (floor, *times, exact, gla))))  # fmt: skip
    return rows


def table() -> list[Prediction]:
    """The committed rows."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return [Prediction(*x[:3], *map(int, x[3:])) for x in list(csv.reader(file))[1:]]


def drawn(rows: list[Prediction]) -> str:
    """A table of docs/performance.md."""
    lines = [
        "| heads | tokens | floor | Nyström | exact | `chunk_gla` |",
        "|---|---|---|---|---|---|",
    ]
    for x in rows:
        ours = f"{x.predicted:,} ({x.low:,} to {x.high:,})"
        lines.append(
            f"| {x.heads} | {x.tokens:,} | {x.floor:,} | {ours} | {x.exact:,} | {x.chunk_gla:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows = predict()
    others = [x for x in table() if (x.triton, x.ptxas) != budgets.tools()]
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Prediction)])
        writer.writerows(
            dataclasses.astuple(x) for x in sorted(others + rows, key=dataclasses.astuple)
        )
    for pass_ in EXACT:
        print(drawn([x for x in rows if x.pass_ == pass_]))


if __name__ == "__main__":
    main()
