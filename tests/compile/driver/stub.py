"""Triton's own driver and launcher on CPU tensors, over a libcuda.so.1 without a GPU (stub_cuda.c).

Nothing is computed: a result is whatever lay in the memory that was allocated for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver

SOURCE = Path(__file__).with_name("stub_cuda.c")
# by a device's number Triton keeps what it has loaded; bench.offline counts from 0
DEVICE, WITHOUT_CODE = 1 << 20, (1 << 20) + 1
CODE_OF_A_FAILURE = 719  # CUDA_ERROR_LAUNCH_FAILED


class Launch(NamedTuple):
    """The last launch, as the driver was asked for it."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


def why_not() -> str | None:
    """Reason why the stub cannot be built and used here, or None."""
    if torch.cuda.is_available():
        return "the CUDA driver of this machine is loaded"
    if shutil.which("cc") is None:
        return "there is no C compiler"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The stub, built and loaded in place of the driver."""
    folder = Path(tempfile.mkdtemp(prefix="stub_cuda_"))
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    target = folder / "libcuda.so.1"
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(target)], check=True)
    triton.knobs.nvidia.libcuda_path = str(folder)
    stub = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = stub.stub_tensor_maps.restype = ctypes.c_long
    stub.stub_name.restype = ctypes.c_char_p
    stub.stub_parameter.restype = ctypes.c_uint64
    return stub


@functools.cache
def _driver():
    """Triton's driver for NVIDIA GPUs, but for what it asks torch."""
    library()
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.device = DEVICE

        def get_current_device(self) -> int:
            return self.device

        def set_current_device(self, device: int) -> None:
            self.device = device

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
            return 9, 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return StubDriver()


def _without_code(_backend=None, stages=None, _options=None, language=None, _capability=None):
    """Triton's hook into the stages of a compilation: kernels of nothing but a name."""
    if stages is None:  # asked for the key and the hash of what the hook does
        return "without code", "without code"

    def of_nothing(name: str, metadata: dict) -> str:
        sizes = ("shared", "tmem_size", "global_scratch_size", "profile_scratch_size")
        metadata.update(dict.fromkeys(sizes, 0), name=name)
        metadata.update(global_scratch_align=1, profile_scratch_align=1)
        return name

    first = "ttir" if language is Language.TRITON else "ttgir"
    stages.clear()
    stages |= {first: of_nothing, "cubin": lambda name, metadata: name}


@contextlib.contextmanager
def _compiling_nothing() -> Iterator[None]:
    with (
        triton.knobs.runtime.scope(),
        triton.knobs.cache.scope(),
        tempfile.TemporaryDirectory() as aside,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Triton 3.6's keys do not know of the hook: a cache and a device aside
        triton.knobs.cache.dir = aside
        patch.setattr(_driver(), "device", WITHOUT_CODE)
        triton.knobs.runtime.add_stages_inspection_hook = _without_code
        for source in (ASTSource, GluonASTSource):
            patch.setattr(source, "make_ir", lambda self, *_: self.fn.__name__)
        yield


@contextlib.contextmanager
def launching(code: bool = True) -> Iterator[ctypes.CDLL]:
    """CPU tensors are taken for those of an H100: the backend "triton" can run, its kernels are
    compiled for it and launched through the stub, which this yields. Without code they are launched
    as they would be, but not compiled: enough to count them, and fast.
    """
    from flashmark import dispatch
    from flashmark.kernels.block_sparse import configs

    active = driver._active
    driver.set_active(_driver())
    try:
        with (
            mock.patch.object(configs, "device_arch", lambda device: 90),
            mock.patch.object(configs, "processors", lambda device: 132),
            mock.patch.object(dispatch, "_why_not_triton", lambda *call: None),
            contextlib.nullcontext() if code else _compiling_nothing(),
        ):
            yield library()
    finally:
        driver._active = active


def last_launch() -> Launch:
    stub = library()
    grid = tuple(stub.stub_grid(axis) for axis in range(3))
    return Launch(stub.stub_name().decode(), grid, stub.stub_threads(), stub.stub_shared())
