"""The archive that spares a machine with a GPU the compiling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
# one small launch in place of the suite's
ONE = """
import sys
from bench import carry
from tests.compile.block_sparse_launches import Launch
carry.launches = lambda forward: [Launch("forward", 32)]
"""
RERUN = """
from bench.offline import compiling_for
with compiling_for(90):
    carry.launches(True)[0].run()
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """A process of its own: the interpreter's would not compile."""
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=settings | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton brings no ptxas")
def test_what_is_carried_need_not_be_compiled(tmp_path):
    made, given = tmp_path / "here" / "gpu.tar.xz", tmp_path / "ptxas"
    made.parent.mkdir()
    given.write_text(f'#!/bin/sh\nexec "{PTXAS}" "$@"\n')  # the real one takes long to pack
    given.chmod(0o755)
    printed = run(ONE + "carry.main()", "pack", str(given), "--out", str(made))
    assert printed.splitlines()[-3:-1] == ["missing:", "  nothing"]
    assert printed.splitlines()[-1].startswith(f"{made}: ")

    there = tmp_path / "there"
    made.parent.rename(there)
    shutil.rmtree(there / "carried")
    exported = run("from bench.carry import main; main()", "unpack", str(there / made.name))
    settings = dict(line.removeprefix("export ").split("=") for line in exported.splitlines())
    cache, ptxas = there / "carried" / "cache", there / "carried" / "ptxas"
    assert settings == {"TRITON_CACHE_DIR": str(cache), "TRITON_PTXAS_PATH": str(ptxas)}
    assert ptxas.read_bytes() == given.read_bytes() and os.access(ptxas, os.X_OK)
    carried = {path.relative_to(cache) for path in cache.rglob("*")}
    assert {path.suffix for path in carried} == {"", ".cubin", ".json"}
    run(ONE + RERUN, **settings)
    assert {path.relative_to(cache) for path in cache.rglob("*")} == carried
