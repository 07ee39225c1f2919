"""Gradients for Hopper in Gluon: a kernel for dK and dV, and one for dQ. Run in emulation,
race-checked; not yet run on a GPU.

Every tile that TMA loads has 64 rows, so both kernels share the descriptors of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashmark.block_sparse.call import Call

from . import arguments as args
from . import passes
from .backward_gluon_kv import backward_kv_gluon_kernel
from .backward_gluon_q import backward_q_gluon_kernel
from .backward_kv import Operands
from .bias import BiasGradient
from .forward_gluon import describe
from .gluon_loads import ROWS


def describe_rows(tensor: Tensor) -> TensorDescriptor:
    """Vectors over the queries of each head, read as tiles (1, ROWS)."""
    rows = tensor.shape[-1]
    shape, strides = [tensor.numel() // rows, rows], [rows, 1]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(tensor, shape, strides, [1, ROWS.value], layout)


def backward(
    operands: Operands, total: BiasGradient, call: Call, described: args.KernelArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV), bitwise repeatable; the gradient of the bias is added to `total`."""
    query, key, value = operands.query, operands.key, operands.value
    dquery, dkey, dvalue = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    pad, pad_v = described.features.PAD, described.features.PAD_V
    q_desc, k_desc = (describe(x, ROWS.value, pad) for x in (query, key))
    dout_desc, v_desc = (describe(x, ROWS.value, pad_v) for x in (operands.dout, value))

    config = passes.choose_gluon("backward_kv", described)
    sizes, features = passes.over_keys(described, call.mask, query, config, atomic=False)
    backward_kv_gluon_kernel[(sizes.tiles * sizes.pairs,)](
        q_desc,
        dout_desc,
        describe_rows(operands.lse),
        describe_rows(operands.delta),
        k_desc,
        v_desc,
        dkey,
        dvalue,
        described.cols,
        described.modifiers,
        call.scale,
        *sizes,
        F=features,
        STAGES=config.num_stages,
        num_warps=4,
        maxnreg=None if features.BLOCK_N == 2 * ROWS.value else 128,  # as the forward
    )

    config = passes.choose_gluon("backward_q", described)
    sizes, features = passes.over_queries(described, call.mask, query, config)
    backward_q_gluon_kernel[(sizes.tiles * sizes.pairs,)](
        q_desc,
        dout_desc,
        k_desc,
        v_desc,
        operands.lse,
        operands.delta,
        dquery,
        total,
        described.rows,
        described.modifiers,
        call.scale,
        *sizes,
        F=features,
        STAGES=config.num_stages,
        num_warps=4,
        maxnreg=None if features.BLOCK_M == 2 * ROWS.value else 128,
    )
    return dquery, dkey, dvalue
