"""The C++ kernels for CPUs.

A shared library per instruction set lies next to this file where the package was built with a
compiler; the one that fits the machine is loaded at the first question. Products go through oneDNN,
so a library belongs to the torch that it was built with.
"""

from __future__ import annotations

import functools
import platform
import re
import warnings
from pathlib import Path

import torch

# what torch reports, on ARM by its level of SVE: the kernels use NEON, which all of them have
_LIBRARIES = {"AVX2": "_cpu_avx2.so", "AVX512": "_cpu_avx512.so", "DEFAULT": "_cpu_default.so"}
_NEON = platform.machine().lower() in ("aarch64", "arm64")


@functools.cache
def _load() -> str:
    """Load the library; "" or the reason why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = _LIBRARIES["DEFAULT"] if _NEON else _LIBRARIES.get(capability)
    path = Path(__file__).with_name(name) if name else None
    if path is None or not path.exists():
        if not _NEON and capability not in ("AVX2", "AVX512"):
            return f"the C++ CPU kernels need AVX2, AVX-512 or ARM, torch reports {capability}"
        others = [other for other in _LIBRARIES.values() if path and path.with_name(other).exists()]
        if others:
            return (
                f"the C++ CPU kernels were not built for {capability}, which torch reports here, "
                f"but for another machine ({', '.join(others)}): install flashmark again"
            )
        return "the C++ CPU kernels were not built with this package"
    reason = _why_not_of_this_torch(path)
    if reason:
        warnings.warn(f"flashmark uses its slower PyTorch code: {reason}", stacklevel=2)
        return reason
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the C++ CPU kernels could not be loaded: {error}"
    return ""


def _why_not_of_this_torch(path: Path) -> str:
    """Whether a library belongs to another torch; to load that one might crash."""
    found = re.search(rb"flashmark built with torch ([0-9.]+)", path.read_bytes())
    built = found[1].decode() if found else "an unknown version"
    if built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return ""
    return (
        f"the C++ CPU kernels were built with torch {built}, but this is torch "
        f"{torch.__version__}: install flashmark again"
    )


def available() -> bool:
    """Whether the kernels can run on this machine with this torch."""
    return not _load()


def why_not() -> str:
    """One sentence on why the kernels cannot run; empty where they can."""
    return _load()
