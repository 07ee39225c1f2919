"""Environment of a measurement: the columns that every row of the CSV carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch


def describe(device: torch.device) -> dict[str, str | int]:
    """Machine, versions, date and git revision."""
    return {
        "date": datetime.date.today().isoformat(),
        "revision": revision(),
        "device": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "ptxas": ptxas_version(),
        "flashmark": version("flashmark"),
    }


def machine(device: torch.device) -> str:
    """Name of the processor that runs the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def ptxas_version() -> str:
    """Version of the assembler that Triton runs, "none" without one."""
    try:
        from triton import knobs

        return knobs.nvidia.ptxas.version
    except (ImportError, AttributeError, RuntimeError):
        return "none"


def revision() -> str:
    """Short git hash of this checkout, with a + after local changes; "unknown" outside of one."""
    root = Path(__file__).resolve().parent
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return commit + "+" * bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
