"""Launches of Triton kernels run in the emulator: real launchers, compiled PTX, CPU tensors.

`emulating(80)` or `emulating(90)` stands in for the driver of a GPU: Triton specialises, compiles
and launches as it does for one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import struct
import time

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.offline import SHARED_MEMORY, _Absent
from flashmark import dispatch
from flashmark.kernels.block_sparse import configs

from . import copies
from .machine import Options, launch
from .parser import parse
from .program import Program

PROCESSORS = 8
_PROGRAMS: dict[str, Program] = {}


@dataclasses.dataclass
class Done:
    """A launch that ran."""

    kernel: str
    seconds: float
    program: Program
    grid: tuple[int, int, int]
    counts: collections.Counter  # warps that ran each block
    conflicts: collections.Counter  # of banks of shared memory, by instruction
    noted: collections.Counter  # faults that are only noted

    @property
    def warps(self) -> int:
        return int(np.prod(self.grid)) * -(-self.program.kernel.threads // 32)


class Emulated(_Absent):
    """A driver whose launches the emulator runs."""

    def __init__(self, target: GPUTarget, options: Options, edit=None):
        super().__init__(target)
        self.options, self.edit = options, edit
        self.launches: list[Done] = []
        self.utils = self
        outer = self

        class Launcher:
            def __init__(self, source, metadata):
                self.source, self.metadata = source, metadata

            def __call__(self, x, y, z, stream, function, packed, info, enter, leave, *arguments):
                outer.launch(self.source, self.metadata, function, (x, y, z), arguments)

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return _NUMBERS.setdefault(self.target, 1000 + len(_NUMBERS))

    def get_device_properties(self, device: int) -> dict:
        return {
            "max_shared_mem": SHARED_MEMORY[self.target.arch],
            "multiprocessor_count": PROCESSORS,
        }

    def load_binary(self, name: str, binary, shared: int, device: int):
        """(module, function, registers, spills, most threads): the name stands for the function."""
        return object(), name, 0, 0, 1024

    def launch(self, source, metadata, name: str, grid, arguments) -> None:
        program = self.program(metadata, name)
        values, tensors = flatten(source, metadata, arguments)
        scratch = []
        for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
            space = np.zeros(int(np.prod(grid)) * size + 128, "u1") if size else None
            scratch.append(space)
            values.append(("*i8", 0 if space is None else -(-space.ctypes.data // 128) * 128))
        params = pack(program, values)
        ranges = [extent(t) for t in tensors]
        ranges += [(s.ctypes.data, s.ctypes.data + s.nbytes) for s in scratch if s is not None]
        start = time.perf_counter()
        done = launch(program, grid, program.kernel.threads, params, ranges, metadata.shared,
                      self.options)  # fmt: skip
        seconds = time.perf_counter() - start
        counted = done.counts, done.conflicts, done.noted
        self.launches.append(Done(program.kernel.name, seconds, program, grid, *counted))

    def program(self, metadata, name: str) -> Program:
        text = self.texts[metadata.hash]
        if self.edit is not None:
            text = self.edit(name, text)
        if text not in _PROGRAMS:
            _PROGRAMS[text] = Program(parse(text)[name])
        return _PROGRAMS[text]

    texts: dict[str, str] = {}


_NUMBERS: dict[GPUTarget, int] = {}


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte + 1 of what a tensor's elements span."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def flatten(source, metadata, arguments) -> tuple[list[tuple[str, object]], list[torch.Tensor]]:
    """[(type, value)] of a kernel's parameters in order, and the tensors among them."""
    values, tensors = [], []
    maps = iter(getattr(metadata, "tensordesc_meta", None) or [])

    def add(kind, value) -> None:
        if isinstance(kind, (tuple, list)):
            for one, inner in zip(kind, value, strict=True):
                add(one, inner)
        elif kind.startswith("tensordesc"):
            tensors.append(value.base)
            values.append(("map", tensor_map(value, next(maps))))
            values.extend(("i32", n) for n in value.shape)
            values.extend(("i64", n) for n in value.strides)
        elif kind == "constexpr":
            pass
        elif kind.startswith("*"):
            if value is not None:
                tensors.append(value)
            values.append((kind, 0 if value is None else value.data_ptr()))
        else:
            values.append((kind, value))

    for kind, value in zip(source.signature.values(), arguments, strict=True):
        add(kind, value)
    return values, tensors


def tensor_map(descriptor, meta: dict) -> bytes:
    """Tensor map as the host encodes it, in the emulator's form."""
    entry = np.zeros(1, copies.MAP)
    one = entry[0]
    rank = len(descriptor.shape)
    size = descriptor.base.element_size()
    one["address"] = descriptor.base.data_ptr()
    one["rank"], one["element"], one["swizzle"] = rank, meta["elem_type"], meta["swizzle"]
    one["dims"][:rank] = list(descriptor.shape)[::-1]
    one["strides"][: rank - 1] = [s * size for s in list(descriptor.strides)[-2::-1]]
    one["box"][:rank] = list(meta["block_size"])[::-1]
    one["steps"][:rank] = 1
    if one["address"] % 16 or any(int(s) % 16 for s in one["strides"]):
        raise ValueError("a tensor map whose address or strides are no multiples of 16 bytes")
    return entry.tobytes()


_FORMS = {"i1": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I",
          "i64": "q",          "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip


def pack(program: Program, values: list[tuple[str, object]]) -> bytes:
    """Parameters as they lie in the kernel's parameter space."""
    space = bytearray(program.param_bytes)
    params = program.kernel.params
    if len(params) != len(values):
        raise TypeError(f"{program.kernel.name} has {len(params)} parameters, got {len(values)}")
    for param, (kind, value) in zip(params, values, strict=True):
        data = value if kind == "map" else struct.pack("<Q" if kind[0] == "*" else f"<{_FORMS[kind]}", value)  # fmt: skip # noqa: E501
        if len(data) != param.size:
            raise TypeError(f"{param}: {kind} has {len(data)} bytes")
        start = program.param_offsets[param.name]
        space[start : start + len(data)] = data
    return bytes(space)


@contextlib.contextmanager
def emulating(arch: int, options: Options | None = None, edit=None):
    """Triton launches on CPU tensors run for `arch`. Yields the driver, which lists them.

    `edit(kernel, ptx)` may change the program first.
    """
    from triton.compiler import CompiledKernel

    stand_in = Emulated(GPUTarget("cuda", arch, 32), options or Options(), edit)
    active, initialise = driver._active, CompiledKernel._init_handles
    saved = configs.device_arch, configs.processors, dispatch.interpreting, dispatch.INTERPRETED

    def note_text(self):
        Emulated.texts[self.hash] = self.asm["ptx"]
        initialise(self)
        if self._run.__class__.__name__ == "Launcher":
            self._run = None  # edits and options of the next driver are its own

    def run(self):
        note_text(self)
        launcher = driver.active.launcher_cls(self.src, self.metadata)
        self.function = self.name
        return launcher

    plain_run = CompiledKernel.run
    driver.set_active(stand_in)
    CompiledKernel.run = property(run)
    configs.device_arch = lambda device: arch
    configs.processors = lambda device: PROCESSORS
    dispatch.interpreting = lambda: True
    dispatch.INTERPRETED = set(dispatch.HALF_OR_SINGLE)
    try:
        yield stand_in
    finally:
        driver._active = active
        CompiledKernel.run = plain_run
        configs.device_arch, configs.processors = saved[:2]
        dispatch.interpreting, dispatch.INTERPRETED = saved[2:]
