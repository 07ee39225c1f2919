"""The largest kernels find their shared memory on GPUs that have little: 99 KiB to a program of
compute capability 8.6, 8.9 and 12.0, 163 KiB to one of 8.0.

Triton lays shared memory out before it optimises: nothing after that is run.
"""

from __future__ import annotations

import os

import pytest
import torch
from triton.backends.nvidia import compiler

from bench.offline import SHARED_MEMORY, compiling_for
from tests.compile import block_sparse_launches, nystrom_launches, routed_launches
from tests.compile import test_hybrid_kernels as hybrid

ASKED = os.environ.get("FLASHMARK_COMPILE_TARGETS")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STANDING = [  # those nearest to the limit
    (86, hybrid.Launch(128, 64, "mass", BF16)),
    (86, hybrid.Launch(128, 64, "mass", FP16)),
    (80, hybrid.Launch(128, 64, "slots", FP32)),
]
LAUNCHES = [
    *(hybrid.Launch(128, d, k, t) for d in (32, 64, 128, 256) for k in ("mass", "masked")
      for t in (BF16, FP16, FP32)),
    *(nystrom_launches.Launch(p, 64, d, dtype=t) for p in ("forward", "backward", "bidirectional")
      for d in (64, 256) for t in (BF16, FP16, FP32)),
    *(nystrom_launches.Launch(p, 128, d, dtype=t) for p in ("forward", "decode") for d in (64, 256)
      for t in (BF16, FP16)),
    *(block_sparse_launches.Launch(p, d, 128, f, t) for p in block_sparse_launches.PASSES
      for d in (128, 256) for f in ("plain", "relative") for t in (BF16, FP32)),
    *(block_sparse_launches.Launch(p, 256, 128, "dense", FP32, "high")
      for p in block_sparse_launches.PASSES if p != "jvp"),
    *(routed_launches.Launch(p, d) for p in ("forward", "backward", "atomic", "decode")
      for d in (128, 256)),
]  # fmt: skip
WIDE = [  # their cores take all that the others have
    nystrom_launches.Launch("backward", 128, d, dtype=t) for d in (64, 256) for t in (BF16, FP16)
]
ALL = [
    *((arch, launch) for launch in LAUNCHES for arch in (80, 86, 120)),
    *((80, launch) for launch in WIDE),
]


@pytest.fixture
def laid_out(monkeypatch, tmp_path):
    """Compilation ends once shared memory is laid out; its results are kept apart."""

    class Unoptimised:
        def __getattr__(self, name):
            return getattr(llvm, name)

        def optimize_module(self, *args) -> None:
            pass

    def named(self, source, metadata, *_) -> str:
        metadata["name"] = "kernel"
        return ""

    llvm = compiler.llvm
    monkeypatch.setattr(compiler, "llvm", Unoptimised())
    monkeypatch.setattr(compiler.CUDABackend, "make_ptx", named)
    monkeypatch.setattr(compiler.CUDABackend, "make_cubin", lambda *_: b"")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("bench.offline._Absent.get_current_device", lambda driver: -2)


@pytest.mark.parametrize(("arch", "launch"), ALL if ASKED else STANDING, ids=str)
def test_the_largest_kernels_find_their_shared_memory(arch, launch, laid_out):
    with compiling_for(arch) as launches:
        launch.run()
    assert launches
    for name, kernel in launches:
        assert kernel.metadata.shared <= SHARED_MEMORY[arch], name
