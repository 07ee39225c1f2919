"""Compile the kernels for compute capability 9.0 here, to spare a machine with a GPU the time:

python -m bench.carry pack PTXAS [--out build/gpu.tar.xz] [--forward] [--seconds 120]
python -m bench.carry unpack build/gpu.tar.xz

The first makes one archive of that ptxas and of the machine code in Triton's cache, which serves
the version of Python and of Triton that made it. A kernel that takes ptxas longer than the limit is
left out, and named. As many launches are compiled side by side as there are processors. The second,
on the other machine, unpacks it beside the archive and prints what to export.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import shlex
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


def pack(ptxas: Path, out: Path, forward: bool, seconds: int) -> None:
    """Compile, and write the archive."""
    folder = out.parent / "carried"
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    shutil.copy(ptxas, folder / "ptxas")
    with tempfile.TemporaryDirectory() as aside:
        limited = Path(aside) / "ptxas"  # Triton's key holds a version, not a path
        limited.write_text(
            f'#!/bin/sh\nexec timeout {seconds} "{(folder / "ptxas").resolve()}" "$@"\n'
        )
        limited.chmod(0o755)
        # before Triton is imported
        os.environ |= environment(folder, limited)
        import triton

        print(f"for Python {platform.python_version()}, Triton {triton.__version__}", flush=True)
        work, missing = list(launches(forward)), []
        with multiprocessing.get_context("spawn").Pool() as pool:
            done = pool.imap_unordered(compile_kernels, work)
            for count, (launch, failed, took) in enumerate(done, 1):
                which = f"{count} of {len(work)}, {took:.1f} s: {launch}"
                print(which, *failed.values(), flush=True)
                missing += [f"{kernel} of {launch}: {why}" for kernel, why in failed.items()]
    with tarfile.open(out, "w:xz", preset=2) as archive:
        archive.add(folder, "carried", filter=what_runs)
    print("missing:", *(missing or ["nothing"]), sep="\n  ")
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


def what_runs(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Machine code of a kernel and its description, not what it was made from; None leaves out."""
    runs = member.isdir() or member.name.endswith((".cubin", ".json", "/ptxas"))
    return member if runs else None


def unpack(archive: Path) -> None:
    """Unpack beside the archive, where Triton will find it."""
    folder = archive.parent / "carried"
    with tarfile.open(archive) as packed:
        packed.extractall(archive.parent, filter="data")
    for group in folder.glob("cache/*/__grp__*"):  # holds the paths of where it was made
        children = json.loads(group.read_text())["child_paths"]
        here = {name: str((group.parent / name).resolve()) for name in children}
        group.write_text(json.dumps({"child_paths": here}))
    for name, value in environment(folder, folder / "ptxas").items():
        print(f"export {name}={shlex.quote(value)}")


def environment(folder: Path, ptxas: Path) -> dict[str, str]:
    """The variables by which Triton finds what is carried in a folder."""
    return {
        "TRITON_CACHE_DIR": str((folder / "cache").resolve()),
        "TRITON_PTXAS_PATH": str(ptxas.resolve()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.carry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command = parser.add_subparsers(required=True)
    packs = command.add_parser("pack")
    packs.set_defaults(run=pack)
    packs.add_argument("ptxas", type=Path)
    packs.add_argument("--out", type=Path, default=Path("build/gpu.tar.xz"))
    packs.add_argument("--forward", action="store_true", help="forward kernels alone")
    packs.add_argument("--seconds", type=int, default=120, help="of ptxas for one kernel")
    unpacks = command.add_parser("unpack")
    unpacks.set_defaults(run=unpack)
    unpacks.add_argument("archive", type=Path)
    given = vars(parser.parse_args())
    given.pop("run")(**given)


if __name__ == "__main__":
    main()
