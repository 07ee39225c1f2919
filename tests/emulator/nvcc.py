"""PTX of the CUDA sources of csrc, kept in build until a source or the compiler changes."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC, KEPT = ROOT / "csrc", ROOT / "build" / "emulator"
SUFFIXES = (".cu", ".cuh", ".h")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FLAGS = ("-std=c++20", "-O2", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
TARGET = "90a"


def compile_source(source: str, targets: tuple[str, ...], *options: str) -> str:
    """Compile for all targets at once, and keep the PTX for TARGET where that is the only one.

    Returns what ptxas reports. The host code needs no CUDA build of torch.
    """
    code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in targets]
    include = f"-I{Path(torch.__file__).parent / 'include'}"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "object.o"
        where = ["-Xcompiler=-fPIC", "--keep", f"--keep-dir={folder}", "-o", str(result)]
        command = [NVCC, *FLAGS, *options, *code, include, *where, "-c", str(CSRC / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if targets == (TARGET,):
            kept, made = _kept(source), Path(folder) / f"{Path(source).stem}.ptx"
            part = Path(tempfile.mkdtemp(dir=kept.parent)) / kept.name
            shutil.copy(made, part)
            part.replace(kept)
            part.parent.rmdir()
    return done.stderr


@functools.cache
def ptx(source: str) -> str:
    kept = _kept(source)
    if not kept.exists():
        compile_source(source, (TARGET,))
    return kept.read_text()


@functools.cache
def _kept(source: str) -> Path:
    version = subprocess.run([NVCC, "--version"], check=True, capture_output=True).stdout
    texts = [path.read_bytes() for path in sorted(CSRC.rglob("*")) if path.suffix in SUFFIXES]
    options = f"{FLAGS}, {TARGET}, torch {torch.__version__}".encode()
    key = hashlib.sha256(b"".join([version, options, *texts])).hexdigest()[:16]
    KEPT.mkdir(parents=True, exist_ok=True)
    return KEPT / f"{Path(source).stem}-{key}.ptx"
