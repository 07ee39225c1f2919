"""Committed figures of the kernels' machine code for sm_90, which may only get better:
tests/compile/budgets.csv, by the versions of Triton and ptxas.

python tests/compile/budgets.py [part of a launch's name] measures the launches of HEADLINES, or
with --all every launch of the suite, and writes what is new or better; with --worse what is worse,
too.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import sys
from pathlib import Path

import triton

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.offline import compiling_for, inspect
from tests.compile import machine_code

TABLE = Path(__file__).with_name("budgets.csv")
# no matrix products in them
SMALL = (
    "delta_kernel", "merge_kernel", "scan_kernel", "reverse_scan_kernel", "tokens_kernel",
    "join_slots_kernel",
)  # fmt: skip
ONE_FORM = "output_kernel"  # its second loop is rare, and no form of the first
HEADLINES = (
    "forward-bf16-D64-causal-plain", "forward-bf16-D64-block128-plain",
    "forward-bf16-D128-causal-plain", "forward-bf16-D128-block128-plain",
    "forward-bf16-D64-block128-relative", "forward-bf16-D128-block128-relative",
    "jvp-bf16-D64-block128-plain", "jvp-bf16-D128-block128-plain",
    "two-pass-bf16-D64-causal-plain", "two-pass-bf16-D64-block128-plain",
    "two-pass-bf16-D128-causal-plain", "two-pass-bf16-D128-block128-plain",
    "two-pass-bf16-D64-block128-relative", "two-pass-bf16-D128-block128-relative",
    "one-pass-bf16-D64-block128-plain", "one-pass-bf16-D128-block128-plain",
    "gluon-D64-sparse128-bfloat16", "gluon-D128-sparse128-bfloat16",
    "gluon-backward-D64-sparse128-bfloat16", "gluon-backward-D128-sparse128-bfloat16",
    "gluon-backward-D64-causal128-bfloat16", "gluon-backward-D128-causal128-bfloat16",
    "gluon-backward-D64-causal128-bfloat16-relative",
    "gluon-backward-D128-sparse128-bfloat16-relative",
    "gluon-backward-D64-causal128-bfloat16-dense", "gluon-backward-D128-sparse128-bfloat16-dense",
    "gluon-backward-D64-causal128-bfloat16-dropout",
    "gluon-backward-D128-sparse128-bfloat16-dropout",
    "forward-bf16-M64-D64-plain", "forward-bf16-M64-D128-plain", "forward-bf16-M128-D128-plain",
    "backward-bf16-M64-D64-plain", "backward-bf16-M128-D128-plain",
    "backward-bf16-M64-D64-decay", "backward-bf16-M64-D64-grouped",
    "decode-bf16-M64-D64-plain", "bidirectional-bf16-M64-D64-plain",
    "slots-bf16-M64-D64", "masked-bf16-M64-D128", "slots-bf16-M128-D128",
    "mass-bf16-M64-D64", "mass-bf16-M128-D128",
    "routed-forward-bf16-D64-block64-plain", "routed-forward-bf16-D128-block64-plain",
    "routed-backward-bf16-D64-block64-plain", "routed-backward-bf16-D128-block64-plain",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Figures:
    """One kernel. `full` and `partial` are the instructions of a FULL and of a PARTIAL tile in
    their loops, 0 where there is no such loop.
    """

    registers: int
    spilled: int
    serialised: int  # 1 where ptxas waits for each matrix product before it starts the next
    full: int
    partial: int

    def worse_than(self, other: Figures) -> list[str]:
        """Each figure that is higher. Registers are no worse below a step of the occupancy."""
        pairs = [
            (field.name, getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        ]
        return [
            f"{name}: expected at most {least}, got {now}"
            for name, now, least in pairs
            if now > least and not (name == "registers" and _step(now) == _step(least))
        ]


def _step(registers: int) -> int:
    """Programs of 8 warps that fit a multiprocessor's registers."""
    return 65536 // (256 * max(registers, 1))


Key = tuple[str, str, str, str]  # versions of Triton and ptxas, launch, kernel


def tools() -> tuple[str, str]:
    """Versions of Triton and of the ptxas that it runs."""
    return triton.__version__, triton.knobs.nvidia.ptxas.version


def measure(name: str, kernel) -> Figures:
    """The figures of a compiled kernel."""
    code = machine_code.disassemble(kernel.asm["cubin"])
    report = inspect(name, kernel)
    loops = code.product_loops()
    if name.startswith(ONE_FORM):
        loops = loops[:1]
    full, partial = (*(len(loop.body) for loop in loops), 0, 0)[:2]
    if len(loops) > 1:  # the first may be unrolled
        full //= max(1, loops[0].products // loops[1].products)
    return Figures(
        report.registers, report.spilled, int(machine_code.serialised(code)), full, partial
    )


@functools.cache
def table() -> dict[Key, Figures]:
    """Committed figures of each kernel."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {(a, b, c, d): Figures(*map(int, rest)) for a, b, c, d, *rest in rows}


def distinct(launches: list) -> list:
    """The kernels of a call, each once; further forms of one are numbered from 2."""
    forms: dict[str, list[str]] = {}
    found = []
    for name, kernel in launches:
        seen = forms.setdefault(name, [])
        if kernel.hash not in seen:
            seen.append(kernel.hash)
            found.append((name if len(seen) == 1 else f"{name} {len(seen)}", kernel))
    return found


def complaints(launch: str, name: str, kernel) -> list[str]:
    """Faults in the machine code of a kernel, and figures worse than the committed ones."""
    code = machine_code.disassemble(kernel.asm["cubin"])
    wrong = machine_code.hazards(code) + machine_code.beyond_grants(code)
    known = table().get((*tools(), launch, name))
    return wrong if known is None else wrong + measure(name, kernel).worse_than(known)


def all_launches() -> list:
    """The launches of the suite, of all operators."""
    from tests.compile import (
        block_sparse_launches,
        routed_launches,
        test_hopper_backward,
        test_hopper_forms,
        test_hybrid_kernels,
        test_nystrom_kernels,
    )

    return [
        *block_sparse_launches.all_launches(),
        *test_hopper_forms.LAUNCHES,
        *test_hopper_backward.LAUNCHES,
        *dict.fromkeys([*test_nystrom_kernels.SUITE, *test_nystrom_kernels.STANDING]),
        *test_hybrid_kernels.SUITE,
        *routed_launches.all_launches(),
    ]


def main(part: str, everything: bool, worse: bool) -> int:
    """Measure, print and write; 1 where something is worse and was left as it is."""
    rows, left = dict(table()), 0
    for launch in all_launches():
        if part not in str(launch) or not (everything or str(launch) in HEADLINES):
            continue
        with compiling_for(90) as launches:
            launch.run()
        for name, kernel in distinct(launches):
            if name.partition(" ")[0] in SMALL:
                continue
            key = (*tools(), str(launch), name)
            now, before = measure(name, kernel), rows.get(key)
            lost = now.worse_than(before) if before else []
            print(*key, *dataclasses.astuple(now), "; ".join(lost), flush=True)
            if lost and not worse:
                left = 1
            else:
                rows[key] = now
        write(rows)
    return left


def write(rows: dict[Key, Figures]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [field.name for field in dataclasses.fields(Figures)]
        writer.writerow(["triton", "ptxas", "launch", "kernel", *names])
        writer.writerows([*key, *dataclasses.astuple(rows[key])] for key in sorted(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--worse", action="store_true")
    given = parser.parse_args()
    sys.exit(main(given.part, given.all, given.worse))
