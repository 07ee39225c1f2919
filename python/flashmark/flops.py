"""FLOP formulas of the operators, for torch.utils.flop_counter."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_registered: set[str] = set()


def register_if_counting() -> None:
    """Register the formulas once flop_counter is in use: importing it would import Triton.

    A counter copies the registry when it is made, so those that count already are told as well.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for name, formula in FORMULAS.items():
        if name not in _registered:
            operator = getattr(torch.ops.flashmark, name)
            module.register_flop_formula(operator, get_raw=True)(formula)
            _registered.add(name)
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", None)
            if isinstance(counter, module.FlopCounterMode):
                for name in FORMULAS:
                    operator = getattr(torch.ops.flashmark, name)
                    counter.flop_registry.setdefault(operator, module.flop_registry[operator])


#: operator name -> formula of its raw arguments; each operator adds its own
FORMULAS: dict[str, Callable[..., int]] = {}
