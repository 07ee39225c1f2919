"""What pyproject.toml cannot say: where the kernels lie, and the optional C++ extension.

FLASHMARK_BUILD_EXT=0 builds no extension; =1 makes a failed build an error; =cuda does so with the
CUDA sources. Unset, each part is built where torch and its compiler are there, and the package
installs without it otherwise. FLASHMARK_CPU=all builds the CPU kernels for every instruction set,
not for this machine's alone.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
KERNELS = sorted(p.parent.name for p in ROOT.glob("kernels/*/__init__.py"))


def extension_options() -> dict:
    """`ext_modules` and `cmdclass` for setup(), empty where no extension is to be built."""
    wish = os.environ.get("FLASHMARK_BUILD_EXT", "")
    if wish not in ("", "0", "1", "cuda"):
        raise ValueError(f"FLASHMARK_BUILD_EXT: expected 0, 1 or cuda, got {wish!r}")
    script = ROOT / "csrc" / "build.py"
    if wish == "0" or not script.exists():
        return {}
    if importlib.util.find_spec("torch") is None:
        if wish:
            raise ModuleNotFoundError(
                f"FLASHMARK_BUILD_EXT={wish} needs torch: install it, then use --no-build-isolation"
            )
        return {}
    spec = importlib.util.spec_from_file_location("flashmark_csrc_build", script)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.setup_options(required=bool(wish), cuda=True if wish == "cuda" else None)


setup(
    packages=find_packages("python") + [f"flashmark.kernels.{name}" for name in KERNELS],
    package_dir={"": "python"}
    | {f"flashmark.kernels.{name}": f"kernels/{name}" for name in KERNELS},
    package_data={"flashmark": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # the libraries call no Python
    **extension_options(),
)
