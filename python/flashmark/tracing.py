"""Hints that functions give to torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """torch.compile calls the function while it traces, and keeps the result as a constant.

    This is `torch.compiler.assume_constant_result`, which itself would import torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Run without the modes around (fake tensors, tracing, counting): tensors inside are plain."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
