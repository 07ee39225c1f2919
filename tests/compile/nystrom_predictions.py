"""Predicted time of the forward of causal Nyström attention on an H200 for M = D = 64 in bfloat16,
from counts of the machine code, beside its floor and others.

python -m tests.compile.nystrom_predictions writes tests/compile/nystrom_predictions.csv and prints
the table of docs/performance.md.

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
from tests.compile import budgets, machine_code, predictions
from tests.compile.nystrom_launches import HALF, Launch
from tests.compile.predictions import CLOCK, PROCESSORS, Kernel, Turn

TABLE = Path(__file__).with_name("nystrom_predictions.csv")
SIZE = 64  # landmarks and columns
COPY = 4.3e12  # bytes a second, measured
SCAN = 696  # cycles of a stretch, all programs of a scan side by side: docs/performance.md
FLOOR = 8 * SIZE  # bytes a token and head: query, key, value, output
# its four kernels: gates summed; keys, values, gates to states; queries, keys, gates to scores of a
# chunk; queries, values, gates, states, scores to the output
GLA = SIZE * ((4 + 4) + (2 + 2 + 4 + 2) + (2 + 2 + 4 + 4) + (2 + 2 + 4 + 2 + 4 + 2))
LENGTHS, HEADS = (4096, 65536, 1 << 20), (8, 16)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One row of the table; microseconds."""

    triton: str
    ptxas: str
    heads: int
    tokens: int
    floor: int
    low: int
    predicted: int
    high: int
    exact: int
    chunk_gla: int


def kernels() -> dict[str, Kernel]:
    """The kernels of a forward that is cut into stretches, compiled now and counted."""
    with compiling_for(90, lambda name, _: name in ("states_kernel", "output_kernel")) as launches:
        Launch("forward", SIZE, SIZE).run()
    found = {}
    for name, compiled in launches[:2]:  # what follows is for rises
        turn = Turn.of(machine_code.disassemble(compiled.asm["cubin"]).product_loops()[0].body, 1)
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
    state = 4 * SIZE * SIZE * programs  # bytes of all stored states
    states = seconds(found["states_kernel"], programs, span // chunk["states_kernel"],
                     4 * SIZE * all_tokens + state, p)  # fmt: skip
    scan = max(SCAN * stretches / CLOCK, 2 * state / COPY)
    output = seconds(found["output_kernel"], programs, span // chunk["output_kernel"],
                     FLOOR * all_tokens + state, p)  # fmt: skip
    return states + scan + output


def predict() -> list[Prediction]:
    """All rows, for the versions of Triton and ptxas that are here."""
    found, tools = kernels(), budgets.tools()
    known = predictions.table()[(*tools, "causal 16k", "gluon-D64-causal128-bfloat16")]
    rows = []
    for heads in HEADS:
        for tokens in LENGTHS:
            times = [forward(found, heads, tokens, p) for p in reversed(predictions.EXPONENTS)]
            exact = 2 * SIZE * heads * tokens**2 / (known.predicted * 1e12)
            by_bytes = [heads * tokens * n / COPY for n in (FLOOR, GLA)]
            rows.append(Prediction(*tools, heads, tokens,
                *(round(1e6 * x) for x in (by_bytes[0], *times, exact, by_bytes[1]))))  # fmt: skip
    return rows


def table() -> list[Prediction]:
    """The committed rows."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return [Prediction(*x[:2], *map(int, x[2:])) for x in list(csv.reader(file))[1:]]


def drawn(rows: list[Prediction]) -> str:
    """The table of docs/performance.md."""
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
    print(drawn(rows))


if __name__ == "__main__":
    main()
