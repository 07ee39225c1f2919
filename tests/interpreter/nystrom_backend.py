"""The operator on the Triton backend: in the interpreter, in the emulator or on a GPU.

Inputs and results are CPU tensors in all cases, so that one test serves all.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch.utils._pytree import tree_map_only

from flashmark.kernels.nystrom import configs
from flashmark.nystrom import nystrom_attention
from tests.interpreter.running import DEVICE, INTERPRETED


@functools.wraps(nystrom_attention)
def op(*args, **kwargs):
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), (args, kwargs))
    results = nystrom_attention(*args, **kwargs, backend="triton")
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)


def shorten(monkeypatch, span: int) -> None:
    """Stretches of `span` tokens, slots of half of it; interpreted, float32 passes in few, wide
    launches: half the time.

    Half precision keeps the launches and the columns of a GPU.
    """
    choose = configs.choose

    def chosen(arch, pass_, dtype, width, head_dim, v_dim, tokens):
        config = choose(arch, pass_, dtype, width, head_dim, v_dim, tokens)
        if dtype != torch.float32 or not INTERPRETED:
            return config
        chunk = 32 if pass_ in ("states", "pieces", "read") else config.chunk
        columns = {"block_d": min(head_dim, 128), "block_v": min(v_dim, 128)}
        return dataclasses.replace(config, chunk=chunk, shares=1, **columns)

    monkeypatch.setattr(configs, "choose", chosen)
    for name in ("FORWARD_SPAN", "BACKWARD_SPAN", "READ_SPAN"):
        monkeypatch.setattr(configs, name, span)
    monkeypatch.setattr(configs, "BACKWARD_SLOT", span // 2)
