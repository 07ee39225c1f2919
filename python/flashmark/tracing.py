"""What functions say to torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """torch.compile calls the function while it traces, and keeps the result as a constant.

    This is `torch.compiler.assume_constant_result`, which itself would import torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
