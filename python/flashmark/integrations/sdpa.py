"""flashmark.scaled_dot_product_attention: PyTorch's signature and semantics."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import scaled_dot_product_attention as _torch_attention

from flashmark import masks
from flashmark.arguments import MAX_DIM, one_or
from flashmark.block_sparse import block_sparse_attention
from flashmark.block_sparse.call import Options as BlockSparseOptions
from flashmark.dispatch import HALF_OR_SINGLE, choose_backend
from flashmark.masks import BlockMask
from flashmark.masks.cache import compiled_tensor

FEWEST_PAIRS = 1 << 14  # (query, key) pairs of a head, on the CPU


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by our kernels where they are faster.

    Every call means what it means in PyTorch: `is_causal` is aligned to the top left (query i sees
    keys 0 to i, whatever the lengths; `block_sparse_attention` aligns to the bottom right), a bool
    `attn_mask` is True where a key takes part, a float one is added to the scores and gets a
    gradient, and dropout applies whenever `dropout_p` > 0 (its random numbers are our own).

    Ours: 2 to 4 dimensions, float16, bfloat16 or float32, head dimensions up to 256, and

    - on the CPU, where the C++ kernels were built: all calls of 16384 (query, key) pairs or more;
    - on a GPU with Triton: calls with a bool mask, or with a float mask that needs a gradient.

    PyTorch's: everything else: arguments it refuses, nested tensors, transforms of `torch.func`,
    `torch.jit.trace`, and calls under `sdpa_kernel(SDPBackend.MATH)`, which has derivatives of all
    orders.

    A bool mask over queries and keys is compiled to tiles at each call (inside `torch.compile` and
    under graph capture it is read as a bias instead). For a mask of many calls use
    `block_sparse_attention` with an expression, or with what `compile_mask` makes of it once.

    Args:
        query: (..., Hq, Nq, D).
        key: (..., Hkv, Nk, D); Hq a multiple of Hkv with `enable_gqa`, else equal.
        value: (..., Hkv, Nk, Dv).
        attn_mask: broadcastable to (..., Hq, Nq, Nk), bool or the dtype of query.
        scale: factor of q k^T; 1 / sqrt(D) when None.

    Returns:
        (..., Hq, Nq, Dv) in the dtype of `query`.
    """
    if not _ours(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return _torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    shape = query.shape
    query, key, value = (_four_dims(x) for x in (query, key, value))
    mask, bias = _mask_and_bias(attn_mask, query.shape[2], key.shape[2])
    options: BlockSparseOptions = {"bias": bias, "scale": scale, "dropout_p": dropout_p}
    if is_causal:
        out = _top_left_causal(query, key, value, **options)
    else:
        out = block_sparse_attention(query, key, value, mask, **options)
    return out.reshape(*shape[:-1], value.shape[3])


def _ours(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> bool:  # fmt: skip
    tensors = [x for x in (query, key, value, attn_mask) if x is not None]
    if not all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors):
        return False  # jagged, distributed, ...
    if any(x.is_nested for x in tensors):
        return False
    if not torch.compiler.is_compiling() and (_transformed(tensors) or _asks_for_math()):
        return False
    simple = (
        isinstance(is_causal, bool)
        and isinstance(dropout_p, float | int)
        and 0.0 <= dropout_p < 1.0
        and isinstance(enable_gqa, bool)
        and (scale is None or (_is_number(scale) and math.isfinite(scale)))
    )
    return (
        simple
        and _shapes_fit(query, key, value, enable_gqa)
        and all(x.dtype == query.dtype and x.device == query.device for x in (key, value))
        and query.dtype in HALF_OR_SINGLE
        and (attn_mask is None or (not is_causal and _mask_fits(attn_mask, query, key)))
        and _ahead(query, key, attn_mask)
    )


def _is_number(scale: object) -> bool:
    return isinstance(scale, float | int) and not isinstance(scale, bool)


def _transformed(tensors: list[Tensor]) -> bool:
    """Whether the call is under vmap, jvp, forward-mode differentiation or jit.trace."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(unpack_dual(x).tangent is not None for x in tensors)
    )


def _asks_for_math() -> bool:
    """Whether `sdpa_kernel` leaves PyTorch's MATH alone, which has derivatives of all orders."""
    fused = torch.backends.cuda
    return not (
        fused.flash_sdp_enabled() or fused.mem_efficient_sdp_enabled() or fused.cudnn_sdp_enabled()
    )


def _shapes_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    if not 2 <= query.dim() <= 4 or key.dim() != query.dim() or value.dim() != query.dim():
        return False
    query, key, value = (_four_dims(x) for x in (query, key, value))
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    return (
        min(batch, heads, kv_heads, q_len, kv_len) > 0
        and (heads == kv_heads or (enable_gqa and heads % kv_heads == 0))
        and tuple(key.shape) == (batch, kv_heads, kv_len, dim)
        and tuple(value.shape[:3]) == (batch, kv_heads, kv_len)
        and 1 <= dim <= MAX_DIM
        and 1 <= value.shape[3] <= MAX_DIM
    )


def _mask_fits(attn_mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """The argument as PyTorch takes it; PyTorch itself raises for others."""
    shape = *query.shape[:-1], key.shape[-2]
    sizes = zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    return (
        2 <= attn_mask.dim() <= len(shape)
        and all(one_or(got, want) for got, want in sizes)
        and attn_mask.dtype in (torch.bool, query.dtype)
        and attn_mask.device == query.device
    )


def _ahead(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> bool:
    backend = choose_backend("block_sparse", "auto", query)
    if backend == "cpu":
        return query.shape[-2] * key.shape[-2] >= FEWEST_PAIRS
    masked = attn_mask is not None and (attn_mask.dtype == torch.bool or attn_mask.requires_grad)
    return backend == "triton" and masked


def _four_dims(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def _top_left_causal(
    query: Tensor, key: Tensor, value: Tensor, **options: Unpack[BlockSparseOptions]
) -> Tensor:
    """Attention with causality aligned to the top left: a square for the queries that have a key
    of their own number; the others see every key."""
    square = min(query.shape[2], key.shape[2])
    rows = query[:, :, :square], key[:, :, :square], value[:, :, :square]
    out = block_sparse_attention(*rows, masks.causal(), **options)
    if square == query.shape[2]:
        return out
    rest = block_sparse_attention(query[:, :, square:], key, value, **options)
    return torch.cat([out, rest], dim=2)


def _mask_and_bias(
    attn_mask: Tensor | None, q_len: int, kv_len: int
) -> tuple[BlockMask | None, Tensor | None]:
    if attn_mask is None:
        return None, None
    if attn_mask.dtype != torch.bool:
        return None, _four_dims(attn_mask)
    if tuple(attn_mask.shape[-2:]) != (q_len, kv_len) or not _may_compile(attn_mask):
        hidden = attn_mask.new_full((), -torch.inf, dtype=torch.float32)
        return None, _four_dims(torch.where(attn_mask, 0.0, hidden))
    return compiled_tensor(attn_mask), None


def _may_compile(mask: Tensor) -> bool:
    """Whether a mask may be compiled to tiles, which reads numbers back from the device."""
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or capturing)
