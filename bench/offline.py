"""Compile Triton kernels for a GPU that is not there, exactly as a launcher would launch them.

Launchers run on CPU tensors; what they launch is compiled and noted instead. So specialisation,
tile sizes and features are those of a real call. A process does this or interprets, never both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
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
    """Figures of one compiled kernel; from `threads` on None without NVIDIA machine code."""

    kernel: str
    warps: int  # as the config has it; those that specialise come on top
    shared: int
    threads: int | None = None  # of a program, all its warps
    registers: int | None = None
    spilled: int | None = None  # bytes of stack to one thread
    hgmma: int | None = None
    hmma: int | None = None


def parse_target(name: str) -> int | str:
    """The number of an NVIDIA architecture, sm_90 -> 90; the name of any other."""
    return int(name.removeprefix("sm_")) if name.startswith("sm_") else name


class _Absent:
    """Stand-in for the driver of a GPU."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Device number of the target: Triton's key for its compiled kernels."""
        return _NUMBERS.setdefault(self.target, len(_NUMBERS))

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


_NUMBERS: dict[GPUTarget, int] = {}
_INSPECTED: dict[str, Report] = {}


@contextlib.contextmanager
def compiling_for(arch: int | str, wanted: Callable[[str, tuple], bool] = lambda name, args: True):
    """Yields a list to which every launch adds (kernel name, compiled kernel).

    A launch that is not `wanted`, by its kernel's name and its arguments, does nothing.
    """
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    launches = []
    run, device_arch, processors = JITFunction.run, configs.device_arch, configs.processors

    def compile_only(self, *args, grid, warmup, **options):
        name = self.fn.__name__
        if wanted(name, (*args, *options.values())):
            launches.append((name, run(self, *args, grid=grid, warmup=True, **options)))

    active = driver._active
    driver.set_active(_Absent(target))
    JITFunction.run = compile_only
    configs.device_arch = lambda device: arch
    configs.processors = lambda device: 132
    try:
        yield launches
    finally:
        driver._active = active
        JITFunction.run, configs.device_arch, configs.processors = run, device_arch, processors


def inspect(name: str, compiled) -> Report:
    """Registers, spills and matrix instructions, from the machine code, read once a kernel."""
    if compiled.hash not in _INSPECTED:
        _INSPECTED[compiled.hash] = _inspect(name, compiled)
    return _INSPECTED[compiled.hash]


def _inspect(name: str, compiled) -> Report:
    facts = {
        "kernel": name,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
    }
    if "cubin" not in compiled.asm:
        return Report(**facts)
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    code = listing(compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"])[1])
    counts = {op.lower(): len(re.findall(rf"\b{op}\b", code)) for op in ("HGMMA", "HMMA")}
    return Report(**facts, threads=threads, registers=registers, spilled=stack, **counts)


@functools.lru_cache(maxsize=8)  # it takes as long as a quarter of the compilation
def listing(cubin: bytes) -> str:
    """Machine code of a compiled kernel, as `nvdisasm -c` prints it."""
    return _tool("nvdisasm", "-c", cubin)


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        command = [TOOLS / name, flag, binary.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
