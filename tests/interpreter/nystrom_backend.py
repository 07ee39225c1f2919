"""The operator on the Triton backend, in the interpreter or, with TRITON_INTERPRET unset, on a GPU.

Inputs and results are CPU tensors in both cases, so that one test serves both.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import torch
from torch.utils._pytree import tree_map_only

from flashmark.kernels.nystrom import configs
from flashmark.nystrom import nystrom_attention

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@functools.wraps(nystrom_attention)
def op(*args, **kwargs):
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), (args, kwargs))
    results = nystrom_attention(*args, **kwargs, backend="triton")
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)


def shorten(monkeypatch, span: int) -> None:
    """Slots of `span` tokens, and float32 passes in one launch each: half the time to interpret.

    Half precision keeps the launches that a pass of the backward is cut into on a GPU.
    """
    choose = configs.choose

    def chosen(pass_, dtype, *sizes):
        config = choose(pass_, dtype, *sizes)
        return dataclasses.replace(config, shares=1) if dtype == torch.float32 else config

    monkeypatch.setattr(configs, "choose", chosen)
    for name in ("FORWARD_SPAN", "BACKWARD_SPAN", "READ_SPAN"):
        monkeypatch.setattr(configs, name, span)
