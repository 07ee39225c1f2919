"""FLOP formulas of the operators, for torch.utils.flop_counter."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
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


def _pairs(query: Tensor, key: Tensor, mask: list[Tensor], layout: list[int], kind: str) -> int:
    """(query, key) pairs of all samples and heads: whole tiles for a compiled mask."""
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    if kind == "sparse" and not isinstance(mask[4], torch._subclasses.FakeTensor):
        _, _, block_q, block_kv, mask_batch, mask_heads = layout
        repeats = (batch // mask_batch) * (heads // mask_heads)
        return int(mask[4].sum()) * block_q * block_kv * repeats
    if kind == "causal":
        seen = min(q_len, kv_len)
        return (
            batch
            * heads
            * (
                q_len * kv_len - seen * (seen - 1) // 2
                if kv_len >= q_len
                else seen * (seen + 1) // 2
            )
        )
    return batch * heads * q_len * kv_len


def _forward_flops(query, key, value, mask, layout, kind, *args, **kwargs) -> int:
    pairs = _pairs(query, key, mask, layout, kind)
    return 2 * pairs * (query.shape[3] + value.shape[3])


def _backward_flops(
    dout, dlse, query, key, value, out, lse, residual, mask, layout, kind, *args, **kwargs
) -> int:
    """S, dQ, dK over D; dP, dV over Dv: the five products of the mathematics."""
    pairs = _pairs(query, key, mask, layout, kind)
    return 2 * pairs * (3 * query.shape[3] + 2 * value.shape[3])


#: operator name -> formula; the modules of other operators add theirs
FORMULAS = {
    "block_sparse_forward": _forward_flops,
    "block_sparse_backward": _backward_flops,
}
