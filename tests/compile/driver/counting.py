"""GPU launches of a call: Triton kernels that reach the driver, PyTorch operators that compute."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = set(
    "view expand slice select transpose unsqueeze squeeze as_strided permute detach alias split t "
    "_unsafe_view empty new_empty empty_like empty_strided new_empty_strided _reshape_alias unbind "
    "diagonal split_with_sizes reshape narrow chunk view_as unflatten movedim mT promote_types "
    "fill_".split()  # the suite fills new memory with NaN
)
COMPOSITE = torch._C.DispatchKey.CompositeExplicitAutograd


class Count(TorchDispatchMode):
    """Counts by name, also of operators inside those of flashmark."""

    def __init__(self):
        super().__init__()
        self.aten: collections.Counter[str] = collections.Counter()
        self.triton: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        if space == "flashmark":
            with self:
                return function._op_dk(COMPOSITE, *args, **(kwargs or {}))
        with self:  # inference mode shows what is made of others
            parts = function.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        if space == "aten" and name not in VIEWS:
            self.aten[name] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count inside `stub.launching()`."""
    count, metadata = Count(), triton.compiler.CompiledKernel.launch_metadata

    def note(kernel, *arguments):
        count.triton[kernel.name] += 1
        return metadata(kernel, *arguments)

    with pytest.MonkeyPatch.context() as patch, count:
        patch.setattr(triton.compiler.CompiledKernel, "launch_metadata", note)
        yield count
