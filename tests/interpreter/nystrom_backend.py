"""The operator on the Triton backend, in the interpreter or, with TRITON_INTERPRET unset, on a GPU.

Inputs and results are CPU tensors in both cases, so that one test serves both.
"""

from __future__ import annotations

import functools
import os

import torch
from torch.utils._pytree import tree_map_only

from flashmark.nystrom import nystrom_attention

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@functools.wraps(nystrom_attention)
def op(*args, **kwargs):
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), (args, kwargs))
    results = nystrom_attention(*args, **kwargs, backend="triton")
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)
