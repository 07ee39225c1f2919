"""Compile the kernels for compute capability 9.0 here, to spare a machine with a GPU the time:

python -m bench.carry PTXAS [--out build/gpu.tar.xz] [--forward] [--seconds 120]

Makes one archive of that ptxas and of Triton's cache, which serves the version of Python and of
Triton that made it. A kernel that takes ptxas longer than the limit is left out, and named. As many
launches are compiled side by side as there are processors.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMED_OUT = 124  # exit code of `timeout`


def launches(forward: bool) -> Iterator:
    """The launches of the compile suite, and those that the bench makes besides; of the forward
    kernels alone if `forward`.
    """
    from tests.compile import (
        block_sparse_launches,
        nystrom_launches,
        test_hopper_backward,
        test_hopper_forms,
    )

    yield from test_hopper_forms.LAUNCHES
    yield test_hopper_forms.Launch("gluon", 128, "causal", feature="relative")
    if not forward:
        for launch in test_hopper_backward.LAUNCHES:
            yield launch
            yield dataclasses.replace(launch, grouped=False)  # a kernel of its own
    for launch in block_sparse_launches.all_launches():
        if not forward or launch.pass_ == "forward":
            yield launch
    if not forward:
        launch = block_sparse_launches.Launch
        for dim in (64, 128):
            yield launch("one-pass-ungrouped", dim, None, "relative")
        yield launch("one-pass-ungrouped", 128, 64)
        yield launch("decode", 128, None, "lengths")
        yield from nystrom_launches.all_launches()


def compile_kernels(launch: Any) -> tuple[Any, dict[str, str], float]:
    """Compile each kernel of a launch. Returns the launch, the reason for each kernel that failed,
    by its name, and the seconds it took.
    """
    from bench.offline import compiling_for

    start = time.monotonic()
    failed: dict[str, str] = {}
    while True:
        asked: list[str] = []

        def wanted(name: str, _: tuple, asked: list[str] = asked) -> bool:
            asked.append(name)
            return name not in failed

        try:
            with compiling_for(90, wanted):
                launch.run()
            return launch, failed, time.monotonic() - start
        except Exception as error:  # the launch goes on without this kernel
            if not asked or asked[-1] in failed:
                raise
            failed[asked[-1]] = reason_of(error)


def reason_of(error: Exception) -> str:
    """A failure to compile, in a line."""
    text = str(error)
    if f"error code {TIMED_OUT}" in text:
        return "ptxas took too long"
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.carry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ptxas", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.tar.xz"))
    parser.add_argument("--forward", action="store_true", help="forward kernels alone")
    parser.add_argument("--seconds", type=int, default=120, help="of ptxas for one kernel")
    given = parser.parse_args()
    folder = given.out.parent / "carried"
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    shutil.copy(given.ptxas, folder / "ptxas")
    with tempfile.TemporaryDirectory() as aside:
        limited = Path(aside) / "ptxas"  # Triton's key holds a version, not a path
        ptxas = (folder / "ptxas").resolve()
        limited.write_text(f'#!/bin/sh\nexec timeout {given.seconds} "{ptxas}" "$@"\n')
        limited.chmod(0o755)
        # before Triton is imported
        os.environ["TRITON_CACHE_DIR"] = str((folder / "cache").resolve())
        os.environ["TRITON_PTXAS_PATH"] = str(limited)
        import triton

        print(f"for Python {platform.python_version()}, Triton {triton.__version__}", flush=True)
        work, missing = list(launches(given.forward)), []
        with multiprocessing.get_context("spawn").Pool() as pool:
            done = pool.imap_unordered(compile_kernels, work)
            for count, (launch, failed, seconds) in enumerate(done, 1):
                which = f"{count} of {len(work)}, {seconds:.1f} s: {launch}"
                print(which, *failed.values(), flush=True)
                missing += [f"{kernel} of {launch}: {why}" for kernel, why in failed.items()]
    with tarfile.open(given.out, "w:xz") as archive:
        archive.add(folder, "carried")
    print("missing:", *(missing or ["nothing"]), sep="\n  ")
    print(f"{given.out}: {given.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
