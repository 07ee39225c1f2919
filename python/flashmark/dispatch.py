"""Choice of the backend: `can_run_*` answers the dispatcher and words the user's error message."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from flashmark import cpu
from flashmark.tracing import constant_when_traced

BACKENDS = ("auto", "triton", "cpu", "eager", "reference")
#: landmarks on a GPU, in half precision and in float32: a program holds all of them at once
MOST_TRITON_LANDMARKS = {"nystrom": (128, 64), "hybrid": (128, 128)}
#: the same in half precision where gradients follow and a program has 99 KiB of shared memory: that
#: of Nyström attention keeps a core twice, in products from either side
MOST_IN_LITTLE_MEMORY = {"nystrom": 64}
#: compute capabilities with 163 KiB of shared memory to a program, or more
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))
#: operators with C++ kernels for CPUs, and what their calls leave to plain PyTorch
CPU_KERNELS = {
    "block_sparse": "",
    "nystrom": "is_causal=False runs in plain PyTorch",
    "hybrid": "with gradients, the far field runs in plain PyTorch",
    "routed": "",
}
HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
#: Triton's interpreter multiplies the bit patterns of bfloat16; a fix of it adds the dtype here
INTERPRETED = {torch.float16, torch.float32}


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run; the message says why."""


def _answer(reason: str | None, backend: str, raise_error: bool) -> bool:
    if reason is not None and raise_error:
        raise BackendUnavailable(
            f"backend: expected one that can run here, got {backend!r}: {reason}"
        )
    return reason is None


def interpreting() -> bool:
    """True when Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a module exists, without importing it; its parents are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no parent
        return False


def can_run_triton(
    operator: str,
    query: Tensor,
    *,
    landmarks: int = 0,
    gradients: bool = False,
    raise_error: bool = False,
) -> bool:
    """Triton kernels: a GPU of compute capability 8.0 or later, or the interpreter on the CPU."""
    reason = _why_not_triton(operator, query.device, query.dtype, landmarks, gradients)
    return _answer(reason, "triton", raise_error)


@constant_when_traced
def _why_not_triton(
    operator: str, device: torch.device, dtype: torch.dtype, landmarks: int, gradients: bool
) -> str | None:
    if not _is_installed("triton"):
        return "Triton is not installed"
    if not _is_installed(f"flashmark.kernels.{operator}"):
        return f"this build has no Triton kernels for {operator}"
    if dtype not in HALF_OR_SINGLE:
        return f"its kernels take float16, bfloat16 and float32, not {dtype}"
    if interpreting():
        if dtype not in INTERPRETED:
            return f"Triton's interpreter (TRITON_INTERPRET=1) does not compute in {dtype}"
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 needs CPU tensors"
    if device.type != "cuda":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), not {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if operator in MOST_TRITON_LANDMARKS:
        most = MOST_TRITON_LANDMARKS[operator][dtype == torch.float32]
        if landmarks > most:
            return f"its kernels take at most {most} landmarks in {dtype} on a GPU, not {landmarks}"
    if gradients and landmarks > MOST_IN_LITTLE_MEMORY.get(operator, landmarks):
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability not in ROOMY:
            return (
                f"its kernels take at most {MOST_IN_LITTLE_MEMORY[operator]} landmarks with "
                f"gradients on a GPU of compute capability {capability[0]}.{capability[1]}, not "
                f"{landmarks}"
            )
    return None


def can_run_cpu(
    operator: str,
    query: Tensor,
    *,
    landmarks: int = 0,
    gradients: bool = False,
    raise_error: bool = False,
) -> bool:
    """C++ kernels: the extension was built, tensors on the CPU, half or single precision."""
    return _answer(_why_not_cpu(operator, query.device, query.dtype), "cpu", raise_error)


@constant_when_traced
def _why_not_cpu(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it needs CPU tensors, not {device.type}"
    if dtype not in HALF_OR_SINGLE:
        return f"its kernels take float16, bfloat16 and float32, not {dtype}"
    if operator not in CPU_KERNELS:
        return f"there are no C++ kernels for {operator}"
    return cpu.why_not() or None


def can_run_eager(
    operator: str,
    query: Tensor,
    *,
    landmarks: int = 0,
    gradients: bool = False,
    raise_error: bool = False,
) -> bool:
    """Tiled PyTorch runs on every device, in float16, bfloat16, float32 and float64."""
    known = query.dtype in (*HALF_OR_SINGLE, torch.float64)
    reason = None if known else f"it takes floating-point tensors, not {query.dtype}"
    return _answer(reason, "eager", raise_error)


CAN_RUN = {"triton": can_run_triton, "cpu": can_run_cpu, "eager": can_run_eager}


def check_backend_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def choose_backend(
    operator: str, backend: str, query: Tensor, *, landmarks: int = 0, gradients: bool = False
) -> str:
    """The backend that will run. "auto" takes the fastest that can; a named one runs or raises.

    `landmarks` is their number, for operators whose kernels have a limit; `gradients` says that
    some may follow.

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: a named backend that cannot run, with the reason.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu and backend in ("auto", "cpu"):  # first, and quickly: calls there can be small
        if _why_not_cpu(operator, query.device, query.dtype) is None:
            return "cpu"
    check_backend_name(backend)
    if backend == "reference":
        return backend
    if backend != "auto":
        CAN_RUN[backend](
            operator, query, landmarks=landmarks, gradients=gradients, raise_error=True
        )
        return backend
    if query.device.type == "cuda":
        if can_run_triton(operator, query, landmarks=landmarks, gradients=gradients):
            return "triton"
    return "eager"
