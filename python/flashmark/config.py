"""flashmark.show_config: what is installed and what can run."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from flashmark import native
from flashmark.dispatch import CAN_RUN, CPU_KERNELS, MOST_TRITON_LANDMARKS, BackendUnavailable

OPERATORS = ("block_sparse", "nystrom", "hybrid", "routed")


def show_config() -> str:
    """Versions, devices, and for every operator and device which backends can run and why the
    others cannot.

    Returns the text; `print(flashmark.show_config())` shows it.
    """
    lines = [f"flashmark {_version('flashmark')}", f"python    {platform.python_version()}"]
    lines.append(f"system    {platform.system()}, {platform.machine()}")
    lines += [f"torch     {torch.__version__}", f"triton    {_version('triton')}"]
    capability = torch.backends.cpu.get_cpu_capability()
    lines.append(f"cpu       {capability}, {torch.get_num_threads()} threads")
    for device in devices()[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        lines.append(f"{device}    {torch.cuda.get_device_name(device)}, sm_{major}{minor}")
    for operator in OPERATORS:
        for device in devices():
            lines.append(f"{operator} on {device}")
            sample = torch.empty(1, 1, 1, 1, device=device)
            for backend in CAN_RUN:
                lines.append(f"  {backend:<7} {_answer(operator, backend, sample)}")
    reason = native.why_not()
    lines.append(f"native mask and core operators on cpu: {'no: ' + reason if reason else 'yes'}")
    return "\n".join(lines)


def devices() -> list[torch.device]:
    """The CPU, then the GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def _answer(operator: str, backend: str, sample: torch.Tensor) -> str:
    try:
        CAN_RUN[backend](operator, sample, raise_error=True)
    except BackendUnavailable as error:
        return f"no: {str(error).split(': ', 2)[-1]}"
    limit = _limit(operator, backend)
    return f"yes, but {limit}" if limit else "yes"


def _limit(operator: str, backend: str) -> str:
    """The part of an operator that a backend leaves to plain PyTorch, or raises for."""
    if backend == "cpu":
        return CPU_KERNELS[operator]
    if backend == "triton" and operator in MOST_TRITON_LANDMARKS:
        half, single = MOST_TRITON_LANDMARKS[operator]
        limit = f"with at most {half} landmarks on a GPU"
        return limit if half == single else f"{limit}, {single} in float32"
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
