"""Arguments of the kernels: tuples of run-time arguments, and the static features."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flashmark.block_sparse.call import Call

from . import bias as bias_gradient

LOG2E = math.log2(math.e)
REMEMBERED = 1024  # layouts of calls; a record of each takes about a kilobyte
WIDE = 1 << 24  # elements from row to row from which on a tile of 128 rows needs 64 bits


class LaunchSizes(NamedTuple):
    """The integers of a call.

    Kernels take them one by one: inside a tuple, Triton compiles one kernel for integers equal
    to 1, one for multiples of 16 and one for the rest, and ignores `do_not_specialize`.
    """

    pairs: int  # (batch, head) pairs that the grid covers
    heads: int  # heads among them to one sample
    group: int  # query heads to one key head
    q_len: int
    kv_len: int
    rows: int  # rows of the mask: q_len, unless there is a query offset
    line_batch: int  # step in line number from one sample to the next; 0 when they share the mask
    line_head: int
    tiles: int  # programs of the grid to one pair
    section: int  # pairs that run side by side


class Inputs(NamedTuple):
    """Inputs of a forward or a decode kernel; strides are (batch, head, row)."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_strides: tuple[int, int, int]
    key_strides: tuple[int, int, int]
    value_strides: tuple[int, int, int]
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


class Lists(NamedTuple):
    """A BlockMask along one side."""

    run_offsets: Tensor | None
    runs: Tensor | None
    partial_offsets: Tensor | None
    partials: Tensor | None
    counts: Tensor | None
    order: Tensor | None
    bits: Tensor | None


class Modifiers(NamedTuple):
    """Changes to a score between the dot product and the weighted sum. Absent tensors are
    None.
    """

    scale: float  # times log2(e) unless there is a bias, or over softcap where there is one
    softcap: float  # times log2(e) unless there is a bias
    bias: Tensor | None
    bias_strides: tuple[
        int, int, int, int
    ]  # (batch, head, query, key); the entries are contiguous when relative
    sinks: Tensor | None
    seed: Tensor | None
    threshold: int  # dropout keeps the words >= threshold
    keep_scale: float  # 1 / (1 - p)
    offsets: Tensor | None
    offset_stride: int
    lengths: Tensor | None
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


@dataclasses.dataclass(frozen=True)
class Features:
    """Compile-time features of a kernel; a new mask of one kind and block size changes nothing."""

    DIM: int
    DIM_V: int
    PAD: int
    PAD_V: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_Q: int
    BLOCK_KV: int
    KIND: str
    SOFTCAP: bool
    BIAS: str  # "none", "relative" or "dense"
    BIAS_Q: bool  # a dense bias has a query dimension
    BIAS_K: bool
    BIAS_OWNED: bool  # each score has an entry of its own, and so has each element of a tile
    LINEAR: bool  # the logit is the score times a positive factor
    DROPOUT: bool
    OFFSET: bool
    LENGTHS: bool
    CLIP: bool  # FULL tiles may reach beyond a sample's keys
    WIDE: bool  # offsets within a tile take 64 bits
    PRECISION: str
    SLACK: int = 0  # how far, in log2, a maximum may grow before the output is rescaled
    BIAS_GRADIENT: bool = False
    ATOMIC: bool = False  # dQ, and dK and dV of a group of heads, through float32 atomics
    GROUPED: bool = False  # one program walks all query heads of a group
    SHARED_KV: bool = False  # several programs add to one tile of dK and dV

    @property
    def NATURAL(self) -> bool:
        """Whether logits and sums are kept in the natural domain; else in that of log2."""
        return self.BIAS != "none"


class KernelArguments(NamedTuple):
    """A call as kernels see it, besides operands; `over_queries` and `over_keys` fit it to one."""

    sizes: LaunchSizes
    rows: Lists
    cols: Lists
    modifiers: Modifiers
    features: Features


class _Fixed(NamedTuple):
    """The part of a description that sizes, strides, types and numbers of a call decide."""

    sizes: LaunchSizes
    features: Features
    scale: float
    softcap: float
    bias_strides: tuple[int, int, int, int]
    threshold: int
    keep_scale: float


class _Bias(NamedTuple):
    """Layout of a bias."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


_NOTHING = Lists(*[None] * 7)


def describe(call: Call) -> KernelArguments:
    """Collect the arguments that all passes share."""
    query, key, value, mask, bias = call.query, call.key, call.value, call.mask, call.bias
    offset, lengths = call.query_offset, call.kv_lengths
    if bias is not None and bias.dim() == 2 and bias.stride(1) != 1:
        bias = bias.contiguous()
    fixed = _fixed(
        query.shape,
        value.shape,
        (mask.kind, mask.q_len, mask.block_q, mask.block_kv),
        call.scale,
        call.softcap,
        call.dropout_p,
        None if bias is None else _Bias(bias.shape, bias.stride()),
        offset is not None,
        lengths is not None,
        max(query.stride(2), key.stride(2), value.stride(2)) >= WIDE,
        dot_precision(query.dtype),
    )
    modifiers = Modifiers(
        fixed.scale,
        fixed.softcap,
        bias,
        fixed.bias_strides,
        _contiguous(call.sinks),
        call.dropout_seed,
        fixed.threshold,
        fixed.keep_scale,
        _contiguous(offset),
        0 if offset is None or offset.numel() == 1 else 1,
        _contiguous(lengths),
    )
    rows = cols = _NOTHING
    if mask.kind == "sparse":
        rows, cols = Lists(*mask.rows, mask.tile_bits), Lists(*mask.cols, mask.tile_bits)
    return KernelArguments(fixed.sizes, rows, cols, modifiers, fixed.features)


@functools.lru_cache(REMEMBERED)
def _fixed(
    query: tuple[int, ...],
    value: tuple[int, ...],
    mask: tuple[str, int, int, int],
    scale: float,
    softcap: float,
    dropout_p: float,
    bias: _Bias | None,
    offset: bool,
    lengths: bool,
    wide: bool,
    precision: str,
) -> _Fixed:
    """Everything that can be known of a call without its tensors; `query` and `value` are shapes,
    `mask` is (kind, rows, block_q, block_kv).
    """
    (_, heads, q_len, dim), (_, kv_heads, kv_len, dim_v) = query, value
    kind, rows, block_q, block_kv = mask
    kind_of_bias = "none" if bias is None else "relative" if len(bias.shape) == 2 else "dense"
    unit = LOG2E if bias is None else 1.0
    features = Features(
        DIM=dim,
        DIM_V=dim_v,
        PAD=padded(dim),
        PAD_V=padded(dim_v),
        BLOCK_M=0,
        BLOCK_N=0,
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        KIND=kind,
        SOFTCAP=softcap > 0.0,
        BIAS=kind_of_bias,
        BIAS_Q=kind_of_bias == "dense" and bias.shape[2] > 1,
        BIAS_K=kind_of_bias == "dense" and bias.shape[3] > 1,
        BIAS_OWNED=bias is not None and bias.shape == (*query[:3], kv_len) and q_len > 1 < kv_len,
        LINEAR=scale > 0.0 and not softcap and bias is None,
        DROPOUT=dropout_p > 0.0,
        OFFSET=offset,
        LENGTHS=lengths,
        CLIP=lengths and kind == "sparse",
        WIDE=wide,
        PRECISION=precision,
    )
    return _Fixed(
        LaunchSizes(0, 0, heads // kv_heads, q_len, kv_len, rows, 0, 0, 0, 0),
        features,
        scale=scale / softcap if softcap else scale * unit,
        softcap=softcap * unit,
        bias_strides=(0, 0, 0, 0) if bias is None else bias_gradient.strides(*bias),
        threshold=int(dropout_p * 2**32),
        keep_scale=1.0 / (1.0 - dropout_p),
    )


def inputs(query: Tensor, key: Tensor, value: Tensor) -> Inputs:
    return Inputs(query, key, value, strides(query), strides(key), strides(value))


def residual_of(call: Call, lse: Tensor) -> Tensor:
    """Storage for the rounding residual of lse; none without a bias."""
    return lse.new_empty(0) if call.bias is None else torch.empty_like(lse)


@functools.cache
def padded(dim: int) -> int:
    """Width of a tile that holds rows of `dim` elements: a power of two that matrix instructions
    take.
    """
    return max(16, triton.next_power_of_2(dim))


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Batch, head and row stride of a (B, H, N, D) tensor whose last stride is 1."""
    return tensor.stride()[:3]


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: PyTorch's own setting for a GPU."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the device of `tensor`, whatever the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
