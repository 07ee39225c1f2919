"""Public functions that also take DTensors: they run on the shards."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.nn import Parameter

Function = TypeVar("Function", bound=Callable[..., Any])


def over_shards(function: Function) -> Function:
    """Send a call with DTensors to `flashmark.distributed.dtensor`, which is imported only then."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if is_sharded(*args, *kwargs.values()):
            return call_on_shards(function, *args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


def call_on_shards(function: Callable[..., Any], *args, **kwargs) -> Any:
    """`flashmark.distributed.dtensor.call_on_shards`, imported where there are DTensors alone."""
    from flashmark.distributed import dtensor

    return dtensor.call_on_shards(function, *args, **kwargs)


def local_part(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiable; any other tensor itself."""
    if not is_sharded(x):
        return x
    from flashmark.distributed import dtensor

    return dtensor.local_part(cast(Any, x))


def is_sharded(*arguments) -> bool:
    """Whether a DTensor is among the arguments."""
    for x in arguments:
        kind = type(x)
        if kind is Tensor or x is None or kind is Parameter:  # most arguments, and a quick test
            continue
        if isinstance(x, Tensor):
            module = sys.modules.get("torch.distributed.tensor")
            if module is not None and isinstance(x, module.DTensor):
                return True
    return False
