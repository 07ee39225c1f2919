"""Compile the kernels for compute capability 9.0 here, to spare a machine with a GPU the time:

python -m bench.carry PTXAS [--out build/gpu.tar.xz] [--forward]

Makes one archive of that ptxas and of Triton's cache. It is for the version of Triton that made it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path


def launches(forward: bool) -> Iterator:
    """The launches of the compile suite, of the forward kernels alone if `forward`."""
    from tests.compile import (
        block_sparse_launches,
        nystrom_launches,
        test_hopper_backward,
        test_hopper_forms,
    )

    yield from test_hopper_forms.LAUNCHES
    if not forward:
        yield from test_hopper_backward.LAUNCHES
    for launch in block_sparse_launches.all_launches():
        if not forward or launch.pass_ == "forward":
            yield launch
    if not forward:
        yield from nystrom_launches.all_launches()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.carry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ptxas", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.tar.xz"))
    parser.add_argument("--forward", action="store_true", help="forward kernels alone")
    given = parser.parse_args()
    folder = given.out.parent / "carried"
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    shutil.copy(given.ptxas, folder / "ptxas")
    # before Triton is imported
    os.environ["TRITON_CACHE_DIR"] = str((folder / "cache").resolve())
    os.environ["TRITON_PTXAS_PATH"] = str((folder / "ptxas").resolve())
    from bench.offline import compiling_for

    for launch in launches(given.forward):
        with compiling_for(90):
            launch.run()
    with tarfile.open(given.out, "w:xz") as archive:
        archive.add(folder, "carried")
    print(f"{given.out}: {given.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
