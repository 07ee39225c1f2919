"""Kernels in the emulator, a committed table: error beside PyTorch's, faults, instructions.

`python -m tests.emulator.table [sm_80] [sm_90] [--only TEXT] [--missing]` runs the calls of
calls.py and writes them to results.csv, by version of Triton and architecture; `--draw` writes
docs/gpu.md's table from it. An error is the largest relative one of the outputs and gradients of a
call against float64; PyTorch's is that of the same formula in plain PyTorch and the same dtype.
Seconds are of the emulation. A revision is the last that changed kernels.

Before 3.7, Triton puts no fence between cp.async and wgmma, which the ISA asks for: those are
counted in the column `noted`, and end nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import triton

from . import cuda
from .calls import calls
from .counts import executed
from .device import Done, emulating
from .machine import Options
from .races import EmulationError

NOTED = ("no proxy fence: async read",) if triton.__version__ < "3.7" else ()
RESULTS = Path(__file__).with_name("results.csv")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
START, END = "<!-- measured: python -m tests.emulator.table --draw -->", "<!-- end of measured -->"
TARGETS = {80: "sm_80", 90: "sm_90a"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of one call."""

    triton: str
    arch: int
    call: str
    kernel: str
    launches: int
    instructions: int  # of warps
    seconds: float
    error: float
    pytorch: float
    faults: str  # the first, or 0
    noted: int
    revision: str


@functools.cache
def revision() -> str:
    command = ["git", "log", "-1", "--format=%h", "--abbrev=7", "--", "kernels", "csrc"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def rows_of(name: str, arch: int, done: list[Done], errors, faults: str) -> list[Row]:
    by_kernel: dict[str, list[Done]] = {}
    for launch in done:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    return [
        Row(
            triton.__version__,
            arch,
            name,
            kernel,
            len(launches),
            sum(executed(launch.program, launch.counts).total() for launch in launches),
            round(sum(launch.seconds for launch in launches), 2),
            float(f"{errors[0]:.2e}"),
            float(f"{errors[1]:.2e}"),
            faults,
            sum(launch.noted.total() for launch in launches),
            revision(),
        )
        for kernel, launches in by_kernel.items()
    ]


def run(name: str, arch: int) -> list[Row]:
    """Run a call for an architecture."""
    errors, faults = (float("nan"), float("nan")), "0"
    cuda.launched.clear()
    with emulating(arch, Options(only_noted=NOTED)) as device:
        try:
            errors = calls(arch)[name]()
        except EmulationError as error:
            faults = str(error).splitlines()[0]
    return rows_of(name, arch, [*device.launches, *cuda.launched], errors, faults)


def read() -> list[Row]:
    """The committed table."""
    if not RESULTS.exists():
        return []
    kinds = (str, int, str, str, int, int, float, float, float, str, int, str)
    with RESULTS.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Row(*(kind(x) for kind, x in zip(kinds, row, strict=True))) for row in rows]


def write(rows: list[Row]) -> None:
    order = {name: n for n, name in enumerate(calls(90))}
    rows = sorted(rows, key=lambda r: (r.triton, r.arch, order.get(r.call, -1)))
    whole = RESULTS.with_suffix(f".{os.getpid()}")  # so that several may run side by side
    with whole.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in rows)
    whole.replace(RESULTS)


def allowed(pytorch: float) -> float:
    """Error that a result may have beside PyTorch's."""
    return 2 * pytorch + 4 * 2.0**-8


def markdown(rows: list[Row]) -> str:
    """A line a call: its kernels, its error by Triton and architecture, PyTorch's, and faults."""
    columns = sorted({(r.triton, r.arch) for r in rows}, reverse=True)
    titles = [f"{TARGETS[arch]}, Triton {version}" for version, arch in columns]
    heads = ["call", "kernels", *titles, "PyTorch", "races", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(row.call for row in rows):
        some = [row for row in rows if row.call == name]
        kernels = dict.fromkeys(row.kernel.removesuffix("_kernel") for row in some)
        errors = {(row.triton, row.arch): f"{row.error:.1e}" for row in some}
        cells = [name, ", ".join(kernels), *(errors.get(c, "") for c in columns)]
        cells.append(f"{max(row.pytorch for row in some):.1e}")
        cells.append(str(sum(row.faults != "0" for row in some)))
        cells.append(f"{sum(row.seconds for row in some) / len(errors):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    revisions: dict[tuple[str, int], dict[str, None]] = {column: {} for column in columns}
    for row in rows:
        revisions[row.triton, row.arch][row.revision] = None
    cells = ["kernels of revision", "", *map(", ".join, revisions.values()), "", "", ""]
    lines.append("| " + " | ".join(cells) + " |")
    noted = {(row.triton, row.arch, row.call) for row in rows if row.noted}
    for version, arch in sorted({key[:2] for key in noted}):
        count = sum(key[:2] == (version, arch) for key in noted)
        lines.append(
            f"\nUnder Triton {version} for {TARGETS[arch]}, {count} of the calls have products "
            "that read what cp.async wrote with no proxy fence between: no race is counted for it."
        )
    return "\n".join(lines)


def draw() -> str:
    """docs/gpu.md with the table as results.csv has it."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{markdown(read())}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=["sm_80", "sm_90"])
    parser.add_argument("--only", default="", help="calls whose name holds this text")
    parser.add_argument("--missing", action="store_true", help="calls that the table lacks")
    parser.add_argument("--draw", action="store_true", help="write docs/gpu.md, run nothing")
    options = parser.parse_args()
    if options.draw:
        PAGE.write_text(draw())
        return 0
    failed = False
    for arch in (int(target.removeprefix("sm_").rstrip("a")) for target in options.targets):
        for name in calls(arch):
            key = triton.__version__, arch, name
            known = any((r.triton, r.arch, r.call) == key for r in read())
            if options.only not in name or (options.missing and known):
                continue
            now = run(name, arch)
            failed |= any(row.faults != "0" for row in now)
            write([r for r in read() if (r.triton, r.arch, r.call) != key] + now)
            for row in now:
                print(*dataclasses.astuple(row), sep=", ", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
