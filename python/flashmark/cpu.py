"""The C++ kernels for CPUs: block-sparse attention, forward and backward.

A shared library per instruction set lies next to this file where the package was built with a
compiler; the one that fits the machine is loaded at the first question. Products go through oneDNN,
so a library belongs to the torch that it was built with.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_LIBRARIES = {"AVX2": "_cpu_avx2.so", "AVX512": "_cpu_avx512.so"}


@functools.cache
def _load() -> str:
    """Load the library; "" or the reason why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = _LIBRARIES.get(capability)
    if name is None:
        return f"the C++ CPU kernels need AVX2 or AVX-512, torch reports {capability}"
    path = Path(__file__).with_name(name)
    if not path.exists():
        return "the C++ CPU kernels were not built with this package"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the C++ CPU kernels could not be loaded (built for another torch?): {error}"
    return ""


def available() -> bool:
    """Whether the kernels can run on this machine with this torch."""
    return not _load()


def why_not() -> str:
    """One sentence on why the kernels cannot run; empty where they can."""
    return _load()
