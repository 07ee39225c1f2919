"""Backward pass: Delta, then dK and dV, with either a second pass for dQ or float32 atomics."""

from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashmark.block_sparse import eager
from flashmark.block_sparse.call import Call, Grads, Saved

from . import arguments as args
from . import bias as bias_gradient
from . import configs, forms, passes
from .backward_kv import Operands, backward_kv_kernel
from .backward_q import backward_q_kernel
from .primitives import LOG2E, ROWS_OF_A_TILE, head_of, load_rows, load_tile, padded_rows

DELTA_ROWS = 64


@triton.jit(do_not_specialize=["heads", "q_len", "tiles"])
def delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    residual_ptr,
    dlse_ptr,
    sinks_ptr,
    delta_ptr,
    lse2_ptr,
    dsinks_ptr,
    dout_strides,
    heads,
    q_len,
    tiles,
    BLOCK: tl.constexpr,
    DIM_V: tl.constexpr,
    PAD_V: tl.constexpr,
):
    """Delta = rowsum(dO * O) - dLSE, lse as `Operands` has it, and each tile's share of dsink =
    -sum e^(sink - lse) Delta.
    """
    pid = tl.program_id(0)
    pair, start = pid // tiles, (pid % tiles) * BLOCK
    rows64 = tl.cast(pair, tl.int64) * q_len
    dout_ptr = head_of(dout_ptr, dout_strides, pair // heads, pair % heads)
    # [BLOCK, PAD_V]
    out = load_tile(out_ptr + rows64 * DIM_V, start, DIM_V, q_len, BLOCK, DIM_V, PAD_V, True)
    dout = load_tile(dout_ptr, start, dout_strides[2], q_len, BLOCK, DIM_V, PAD_V, True)
    # [BLOCK]
    lse = load_rows(lse_ptr + rows64, start, q_len, float("-inf"), BLOCK, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= load_rows(dlse_ptr + rows64, start, q_len, 0.0, BLOCK, True).to(tl.float32)
    empty = lse == float("-inf")
    delta = tl.where(empty, 0.0, delta)
    offs = start + tl.arange(0, BLOCK)
    padded = tl.cast(pair, tl.int64) * padded_rows(q_len)
    tl.store(delta_ptr + padded + offs, delta)
    residual = tl.zeros_like(delta)
    if residual_ptr is not None:
        residual = load_rows(residual_ptr + rows64, start, q_len, 0.0, BLOCK, True)
        tl.store(lse2_ptr + 2 * padded + offs, tl.where(empty, float("inf"), lse))
        tl.store(lse2_ptr + 2 * padded + padded_rows(q_len) + offs, residual * LOG2E)
    else:
        tl.store(lse2_ptr + padded + offs, tl.where(empty, float("inf"), lse * LOG2E))
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + pair % heads).to(tl.float32)
        # [BLOCK]
        weight = tl.where(empty, 0.0, tl.exp(sink - tl.where(empty, 0.0, lse) - residual))
        tl.store(dsinks_ptr + pid, -tl.sum(weight * delta, 0))


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of `forward`.

    A deterministic call computes dQ in a pass of its own and the bias gradient in fixed point, so
    that results repeat bitwise; otherwise both go through float32 atomics, which is faster, except
    in Gluon, where two passes always compute the gradients.
    """
    query, key, value, bias = call.query, call.key, call.value, call.bias
    if not query.numel() or not key.numel():
        return eager.backward(call, saved, dout, dlse)  # nothing to launch
    described = args.describe(call)
    if dout.stride(-1) != 1 or dout.stride(2) >= args.WIDE:
        dout = dout.contiguous()
    with args.on_device(query):
        delta, lse, dsinks = row_sums(dout, dlse, saved, described.modifiers.sinks)
        total = bias_gradient.start(bias, dout, value, delta, described, call.deterministic)
        operands = Operands(
            query, key, value, dout, lse, delta,
            args.strides(query), args.strides(key), args.strides(value), args.strides(dout),
        )  # fmt: skip
        if forms.backward_form(query, key, value, dout, described) == "gluon":
            gluon = importlib.import_module(f"{__package__}.backward_gluon")  # where it is used
            dquery, dkey, dvalue = gluon.backward(operands, total, call, described)
        elif call.deterministic:
            dkey, dvalue = _keys_and_values(operands, None, total, call, described)
            dquery = _queries(operands, call, described)
        else:
            dquery = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
            dkey, dvalue = _keys_and_values(operands, dquery, total, call, described)
            dquery = torch.mul(
                dquery, call.scale, out=dquery.new_empty(query.shape, dtype=query.dtype)
            )
    return Grads(dquery, dkey, dvalue, bias_gradient.finish(total, bias), dsinks)


def row_sums(
    dout: Tensor, dlse: Tensor | None, saved: Saved, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(delta, lse, dsinks), the first two as `Operands` has them."""
    batch, heads, q_len, dim_v = dout.shape
    rows = triton.cdiv(q_len, ROWS_OF_A_TILE.value) * ROWS_OF_A_TILE.value
    tiles = rows // DELTA_ROWS
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=dout.device)
    biased = saved.residual.numel() > 0
    parts = (2,) if biased else ()
    lse2 = torch.empty(batch, heads, *parts, rows, dtype=torch.float32, device=dout.device)
    shares = None
    if sinks is not None:
        shares = torch.empty(batch, heads, tiles, dtype=torch.float32, device=dout.device)
    delta_kernel[(batch * heads * tiles,)](
        saved.out.contiguous(),
        dout,
        saved.lse.contiguous(),
        saved.residual.contiguous() if biased else None,
        None if dlse is None else dlse.contiguous(),
        sinks,
        delta,
        lse2,
        shares,
        args.strides(dout),
        heads,
        q_len,
        tiles,
        BLOCK=DELTA_ROWS,
        DIM_V=dim_v,
        PAD_V=args.padded(dim_v),
    )
    return delta, lse2, None if sinks is None else shares.sum((0, 2)).to(sinks.dtype)


def _keys_and_values(
    operands: Operands,
    dquery: Tensor | None,
    total: bias_gradient.BiasGradient,
    call: Call,
    described: args.KernelArguments,
) -> tuple[Tensor, Tensor]:
    key, value, atomic = operands.key, operands.value, dquery is not None
    grouped = described.sizes.group > 1
    pass_ = "backward_fused" if atomic else "backward_grouped" if grouped else "backward_kv"
    config = passes.choose_config(pass_, key, described)
    sizes, features = passes.over_keys(described, call.mask, operands.query, config, atomic=atomic)
    if features.SHARED_KV:
        dkey = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        dvalue = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    else:
        dkey = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        dvalue = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    backward_kv_kernel[(sizes.tiles * sizes.pairs,)](
        operands,
        dquery,
        dkey,
        dvalue,
        total,
        described.cols,
        described.modifiers,
        call.scale,
        *sizes,
        F=features,
        **(config.options | _stages(config, operands)),
    )
    return dkey.to(key.dtype), dvalue.to(value.dtype)


def _stages(config: configs.Config, operands: Operands) -> dict[str, int]:
    """Stages of the walk over queries: one on Hopper and later unless both tiles are copied
    asynchronously. Triton would put the proxy fence of a tile that is not in front of the wait for
    one that is, which a product would then read unfenced.
    """
    arch = configs.device_arch(operands.query.device)
    fenced = isinstance(arch, int) and arch >= 90
    copied = _is_copied(operands.query) and _is_copied(operands.dout)
    return {"num_stages": 1 if fenced and not copied else config.num_stages}


def _is_copied(tensor: Tensor) -> bool:
    """Whether Triton copies rows asynchronously for a product: it knows them to be aligned."""
    size = tensor.element_size()
    steps = (step % 16 for step in tensor.stride()[:3])  # what Triton asks of a number
    return not (tensor.shape[-1] * size % 16 or tensor.data_ptr() % 16 or any(steps))


def _queries(operands: Operands, call: Call, described: args.KernelArguments) -> Tensor:
    query = operands.query
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    config = passes.choose_config("backward_q", query, described)
    sizes, features = passes.over_queries(described, call.mask, query, config)
    backward_q_kernel[(sizes.tiles * sizes.pairs,)](
        operands,
        dquery,
        described.rows,
        described.modifiers,
        call.scale,
        *sizes,
        F=features,
        **config.options,
    )
    return dquery
