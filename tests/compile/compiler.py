"""Compile Triton kernels for a GPU that is not there, exactly as a launcher would launch them.

Launchers run on CPU tensors; what they launch is compiled and noted instead. So specialisation,
tile sizes and features are those of a real call. A process does this or interprets, never both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashmark.kernels.block_sparse import configs

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# bytes of shared memory that a program can have
SHARED_MEMORY = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    "gfx942": 65536,
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one kernel. The last four are None where there is no NVIDIA machine code."""

    kernel: str
    warps: int
    shared: int
    registers: int | None = None
    spilled: int | None = None  # bytes of stack to one thread
    hgmma: int | None = None
    hmma: int | None = None


def parse_target(name: str) -> int | str:
    """The number of an NVIDIA architecture, sm_90 -> 90; the name of any other."""
    return int(name.removeprefix("sm_")) if name.startswith("sm_") else name


class _Absent:
    """Stands in for the driver of a GPU."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    @classmethod
    def is_active(cls) -> bool:
        return True


@contextlib.contextmanager
def compiling_for(arch: int | str):
    """Yields a list to which every launch adds (kernel name, compiled kernel)."""
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    launches = []
    run, device_arch, processors = JITFunction.run, configs.device_arch, configs.processors

    def compile_only(self, *args, grid, warmup, **options):
        launches.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(_Absent(target))
    JITFunction.run = compile_only
    configs.device_arch = lambda device: arch
    configs.processors = lambda device: 132
    try:
        yield launches
    finally:
        JITFunction.run, configs.device_arch, configs.processors = run, device_arch, processors


def inspect(name: str, compiled) -> Report:
    """Registers, spills and matrix instructions, from the machine code."""
    facts = {
        "kernel": name,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
    }
    if "cubin" not in compiled.asm:
        return Report(**facts)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = _tool("cuobjdump", "-res-usage", binary.name)
        code = _tool("nvdisasm", "-c", binary.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = {op.lower(): len(re.findall(rf"\b{op}\b", code)) for op in ("HGMMA", "HMMA")}
    return Report(**facts, registers=registers, spilled=stack, **counts)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
