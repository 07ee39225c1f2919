"""Predicted speed of the block-sparse kernels on an H200, from counts of their machine code. Only
the clock comes from a measurement.

`python -m tests.compile.predictions [--only TEXT]` writes predictions.csv and prints its rows.

A turn of a loop takes one tile. Each warp issues an instruction a cycle; the half-rate pipe takes
two cycles for one, the exponential unit eight, a product N / 2 for 64 x N x 16. Groups of warps
that do not wait for each other (programs of a multiprocessor; in the Gluon forms its two
warpgroups) overlap. A group by itself computes products, then the rest; in the Gluon forms half of
the products run during the rest: in the forward the next scores, for dK and dV dP and dV, for dQ
dP and the next scores. The time of a turn lies between the largest of these demands and their sum:
it is taken as (sum of x^p)^(1/p) with p = 3, and p = 2 and 4 give the range.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import re
from pathlib import Path

from bench.offline import compiling_for, inspect
from flashmark.kernels.block_sparse import configs
from tests.compile import budgets, machine_code
from tests.compile.block_sparse_launches import HALF, Launch

TABLE = Path(__file__).with_name("predictions.csv")
PROCESSORS, CLOCK = (
    132,
    1.46e9,
)  # at this clock the units reach the 790 TFLOP/s measured of a product
ENDS = 3000  # cycles of a line besides its tiles: first loads, first product, normalising, storing
WAIT = 60  # cycles from a product's end, or a barrier, to the next instruction
EXPONENTS = (2, 3, 4)
HALF_RATE = re.compile(
    r"FMNMX|LOP3|F?SEL|I?ISETP|FSETP|SHF|LEA|PRMT|IADD3|PLOP3|F2FP|IABS|VIADD|MOV|R2UR"
)
LENGTH, BLOCK = 16384, 128


@dataclasses.dataclass(frozen=True)
class Turn:
    """Cycles that one warp takes of each unit for a tile."""

    issue: int
    half_rate: int
    exponential: int
    products: int
    waits: int

    @staticmethod
    def of(body: list[machine_code.Instruction], tiles: int) -> Turn:
        """From the instructions of a loop that takes `tiles` tiles in a turn."""
        names = collections.Counter(x.name for x in body)
        wide = [re.search(r"HGMMA\.\d+x(\d+)x", x.operation) for x in body if x.name == "HGMMA"]
        half = sum(n for name, n in names.items() if HALF_RATE.fullmatch(name))
        waits = sum("DEPBAR" in x.operation for x in body) + names["BAR"]
        return Turn(
            len(body) // tiles,
            2 * half // tiles,
            8 * names["MUFU"] // tiles,
            sum(max(14, int(n[1]) // 2) for n in wide if n) // tiles,
            waits // tiles,
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its two loops, and how it lies on a multiprocessor."""

    full: Turn
    partial: Turn
    groups: int  # that do not wait for each other
    warps: int  # of a group, on each of the four schedulers
    rows: int  # of a group's tile
    turns: int  # to BLOCK keys
    overlapped: bool

    def cycles(self, turn: Turn, p: float) -> float:
        """Cycles in which each group takes a tile."""
        own = max(turn.issue, turn.half_rate, turn.exponential)
        alone = max(own, turn.products / 2) + turn.products / 2
        if not self.overlapped:
            alone = own + turn.products
        all_warps = self.groups * self.warps
        demands = [all_warps * x for x in (turn.issue, turn.half_rate, turn.exponential)]
        demands += [all_warps * turn.products, self.warps * alone + WAIT * turn.waits]
        return sum(x**p for x in demands) ** (1 / p)

    def rate(self, full: float, partial: float, flops: float, p: float) -> float:
        """TFLOP/s for lines of so many FULL and PARTIAL blocks of keys and flops to a row."""
        time = self.turns * (
            full * self.cycles(self.full, p) + partial * self.cycles(self.partial, p)
        )
        return PROCESSORS * CLOCK * self.groups * self.rows * flops / (time + ENDS) / 1e12


def kernel_of(launch, name: str, config) -> Kernel:
    """Compile one kernel of a launch and count it."""
    with compiling_for(90, lambda asked, _: asked == name) as launches:
        launch.run()
    compiled = launches[0][1]
    code, report = machine_code.disassemble(compiled.asm["cubin"]), inspect(name, compiled)
    bodies = [loop.body for loop in code.product_loops()][:2]
    products = [sum(x.name == "HGMMA" for x in body) for body in bodies]
    full = Turn.of(bodies[0], max(1, products[0] // products[1]))
    gluon = config.form == "gluon"
    fit = min(65536 // (report.registers * report.threads), 233472 // (report.shared + 1024))
    held, walked = config.block_m, config.block_n
    if "kv" in name:
        held, walked = walked, held
    return Kernel(
        full,
        Turn.of(bodies[1], 1),
        groups=2 if gluon else max(1, fit),
        warps=1 if gluon else config.num_warps // 4,
        rows=64 if gluon else held,
        turns=BLOCK // walked,
        overlapped=gluon,
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """A line of blocks on average, and how many keys a row sees."""

    name: str
    full: float
    partial: float
    seen: float


CAUSAL = Work("causal 16k", (LENGTH / BLOCK - 1) / 2, 1, LENGTH / 2)
WINDOW = Work("window 512 at 16k", 3, 2, 512)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One row of the table."""

    triton: str
    ptxas: str
    work: str
    kernels: str
    dim: int
    full: int  # instructions of a FULL tile, of all kernels
    low: int  # TFLOP/s
    predicted: int
    high: int


# by work: (launch, its pass's kernels with the name of each config, products of the mathematics)
FORWARD = (("forward", "forward_kernel", 4),)
ONE_PASS = (("backward_fused", "backward_kv_kernel", 10),)
TWO_PASSES = (("backward_kv", "backward_kv_kernel", 10), ("backward_q", "backward_q_kernel", 10))
IN_GLUON = (
    ("backward_kv", "backward_kv_gluon_kernel", 10),
    ("backward_q", "backward_q_gluon_kernel", 10),
)
ONLY_HERE = [Launch("one-pass", 64, None, feature) for feature in ("dropout", "softcap")]
ROWS = [
    (CAUSAL, "gluon-D64-causal128-bfloat16", FORWARD, 64),
    (CAUSAL, "gluon-D128-causal128-bfloat16", FORWARD, 128),
    (CAUSAL, "forward-bf16-D64-causal-plain", FORWARD, 64),
    (CAUSAL, "forward-bf16-D128-causal-plain", FORWARD, 128),
    (CAUSAL, "one-pass-bf16-D64-causal-plain", ONE_PASS, 64),
    (CAUSAL, "one-pass-bf16-D128-causal-plain", ONE_PASS, 128),
    (CAUSAL, "two-pass-bf16-D64-causal-plain", TWO_PASSES, 64),
    (CAUSAL, "two-pass-bf16-D128-causal-plain", TWO_PASSES, 128),
    (CAUSAL, "gluon-backward-D64-causal128-bfloat16", IN_GLUON, 64),
    (CAUSAL, "gluon-backward-D128-causal128-bfloat16", IN_GLUON, 128),
    (CAUSAL, "gluon-backward-D64-causal128-bfloat16-dropout", IN_GLUON, 64),
    (CAUSAL, "one-pass-bf16-D64-causal-dropout", ONE_PASS, 64),
    (CAUSAL, "gluon-backward-D64-causal128-bfloat16-softcap", IN_GLUON, 64),
    (CAUSAL, "one-pass-bf16-D64-causal-softcap", ONE_PASS, 64),
    (CAUSAL, "gluon-backward-D64-causal128-bfloat16-relative", IN_GLUON, 64),
    (WINDOW, "gluon-backward-D64-sparse128-bfloat16", IN_GLUON, 64),
    (WINDOW, "gluon-backward-D128-sparse128-bfloat16", IN_GLUON, 128),
    (WINDOW, "one-pass-bf16-D64-block128-plain", ONE_PASS, 64),
    (WINDOW, "one-pass-bf16-D128-block128-plain", ONE_PASS, 128),
    (WINDOW, "gluon-D64-sparse128-bfloat16", FORWARD, 64),
    (WINDOW, "gluon-D128-sparse128-bfloat16", FORWARD, 128),
    (WINDOW, "forward-bf16-D64-block128-plain", FORWARD, 64),
    (WINDOW, "forward-bf16-D128-block128-plain", FORWARD, 128),
]


def predict(work: Work, name: str, passes, dim: int) -> Prediction:
    """One row, from kernels compiled now."""
    launch = next(x for x in [*budgets.all_launches(), *ONLY_HERE] if str(x) == name)
    kernels = []
    for pass_, kernel, _ in passes:
        gluon = name.startswith("gluon")
        block = None if "causal" in name else (BLOCK, BLOCK)
        if passes is IN_GLUON:
            config = configs.hopper_backward(pass_, block)
        else:
            extras = not name.endswith("plain")
            config = launch.config if gluon else configs.choose(90, HALF, dim, block, pass_, extras)
        asked = "forward_gluon_kernel" if gluon and passes is FORWARD else kernel
        kernels.append(kernel_of(launch, asked, config))
    flops = passes[0][2] * dim * work.seen
    rates = [
        1 / sum(1 / x.rate(work.full, work.partial, flops, p) for x in kernels) for p in EXPONENTS
    ]
    full = sum(x.full.issue for x in kernels)
    return Prediction(*budgets.tools(), work.name, name, dim, full, *(round(x) for x in rates))


def table() -> dict[tuple[str, ...], Prediction]:
    """Committed predictions by (Triton, ptxas, work, launch)."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {tuple(x[:4]): Prediction(*x[:4], *map(int, x[4:])) for x in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose launch has this in its name")
    only, rows = parser.parse_args().only, table()
    for row in (row for row in ROWS if only in row[1]):
        found = predict(*row)
        rows[found.triton, found.ptxas, found.work, found.kernels] = found
        print(*dataclasses.astuple(found), flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Prediction)])
        writer.writerows(dataclasses.astuple(rows[key]) for key in sorted(rows))


if __name__ == "__main__":
    main()
