"""The operator as every backend has it; the interface is that of `nystrom.eager.interface`."""

from __future__ import annotations

from torch import Tensor

from . import arguments as args
from . import blocks
from .backward import causal_sweep
from .bidirectional import bidirectional_forward, bidirectional_sweep
from .forward import causal_forward


def forward(
    query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
    L0, R0, scale, normalize, is_causal,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, L_end, R_end), in the shapes and dtypes of `nystrom.eager.interface.forward`."""
    call = args.describe(
        query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
        L0, R0, scale, normalize,
    )  # fmt: skip
    return blocks.forward(causal_forward if is_causal else bidirectional_forward, call)


def backward(
    dout, dL_end, dR_end, query, key, value, landmark_queries, landmark_keys, core, decay, key_mask,
    cu_seqlens, L0, R0, scale, normalize, is_causal,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `forward`, in the order and the shapes of `nystrom.eager.interface`."""
    call = args.describe(
        query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
        L0, R0, scale, normalize,
    )  # fmt: skip
    sweep = causal_sweep if is_causal else bidirectional_sweep
    run = causal_forward if is_causal else bidirectional_forward
    grads = blocks.backward(sweep, run, call, dout, dL_end, dR_end)
    inputs = {
        "query": query, "key": key, "value": value, "lq": landmark_queries, "lk": landmark_keys,
        "core": core, "decay": decay, "L0": L0, "R0": R0,
    }  # fmt: skip
    return tuple(
        None if x is None else grads[name].sum_to_size(x.shape).view(x.shape).to(x.dtype)
        for name, x in inputs.items()
    )
