"""Hints that functions give to torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """torch.compile calls the function while it traces, and keeps the result as a constant.

    This is `torch.compiler.assume_constant_result`, which itself would import torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def fake_mode() -> Any:
    """The FakeTensorMode around, where it takes fake tensors alone; else None."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return None if mode is None or mode.allow_non_fake_inputs else mode


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Run without the modes around (fake tensors, tracing, counting) and without the transforms of
    torch.func: tensors inside are plain.
    """
    transforms = temporarily_clear_interpreter_stack()
    with _disable_current_modes(), torch._C.DisableTorchFunction(), transforms:
        yield
