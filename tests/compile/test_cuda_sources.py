"""Every CUDA source compiles for the GPUs that it is built for, and no kernel spills a register:
for Hopper, and where FLASHMARK_COMPILE_TARGETS is set for all of them.

`python tests/compile/test_cuda_sources.py` prints the registers as a table.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.emulator import nvcc

SOURCES = sorted(path.relative_to(nvcc.CSRC).as_posix() for path in nvcc.CSRC.rglob("*.cu"))
TARGETS = ("80", "90a", "100") if os.environ.get("FLASHMARK_COMPILE_TARGETS") else ("90a",)

pytestmark = pytest.mark.skipif(nvcc.NVCC is None, reason="nvcc is not installed")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry function for one target, as ptxas reports it."""

    target: str
    name: str
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # static, bytes


def compiled(source: str) -> list[Kernel]:
    return parse(nvcc.compile_source(source, TARGETS, "-Xptxas=-v"))


def parse(report: str) -> list[Kernel]:
    kernels = []
    for part in report.split("Compiling entry function ")[1:]:
        mangled, target = re.match(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        spilled = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes", part).groups()))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        kernels.append(
            Kernel(target, readable(mangled), registers, spilled, int(shared[1]) if shared else 0)
        )
    return kernels


def readable(mangled: str) -> str:
    """The kernel's own name, and its template's types (f float, d double) where it has any."""
    name = re.search(r"([a-z_]+_kernel)(?:I(\w*?)E)?", mangled)
    return f"{name[1]}<{name[2]}>" if name[2] else name[1]


def test_there_are_cuda_sources_beside_the_cpp():
    for source in SOURCES:
        path = nvcc.CSRC / source
        assert path.with_name(path.name.replace("_cuda.cu", ".cpp")).exists()
    assert len(SOURCES) >= 4


@pytest.mark.parametrize("source", SOURCES)
def test_source_compiles_without_spills(source):
    kernels = compiled(source)
    assert {kernel.target for kernel in kernels} == set(TARGETS)
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= 160, kernel


def main() -> None:
    print("| kernel |", " | ".join(f"sm_{target}" for target in TARGETS), "|")
    print("|---" * (len(TARGETS) + 1) + "|")
    for source in SOURCES:
        table: dict[str, dict[str, str]] = {}
        for kernel in compiled(source):
            cell = f"{kernel.registers} registers, {kernel.spilled} spilled"
            table.setdefault(kernel.name, {})[kernel.target] = cell
        for name, cells in sorted(table.items()):
            print("|", name, "|", " | ".join(cells[target] for target in TARGETS), "|")


if __name__ == "__main__":
    main()
