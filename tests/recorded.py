"""Stand-in for a CUDA graph on CPU tensors: operators are noted with the tensors that they read
and write, and replayed on the same memory. A number that the host kept is the same at every replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHECKS = ("_local_scalar_dense", "equal", "is_same_size")  # of values: on CPU tensors alone


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function._schema.name.split("::")[1] not in CHECKS:
            self.calls.append((function, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, out in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


def record(run: Callable[[], object], restored: list[Tensor]) -> Callable[[], None]:
    """Record `run` and set `restored` back to what it was: a capture computes nothing."""
    before = [x.clone() for x in restored]
    recorder = Recorder()
    with recorder:
        run()
    for x, old in zip(restored, before, strict=True):
        x.copy_(old)
    return recorder.replay
