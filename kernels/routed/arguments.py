"""Arguments of the kernels: tuples of run-time arguments, and the static features."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flashmark.routed.call import Call

from ..block_sparse import configs as shared
from ..block_sparse.arguments import WIDE, dot_precision, padded
from . import configs

LOG2E = math.log2(math.e)
# bytes of what the queries of one chunk find in their chosen blocks
PART_BYTES = 1 << 29


class Sizes(NamedTuple):
    """The integers of a launch, which kernels take one by one, as those of block-sparse attention
    do.
    """

    heads: int  # of keys
    q_len: int
    kv_len: int
    near: int
    top: int  # chosen blocks of a query
    chunk: int  # queries that are gathered together
    start: int  # first query of the chunk


class Modifiers(NamedTuple):
    """Changes to a score, and what says which keys are there. Absent tensors are None."""

    scale: float  # times log2(e), or over softcap where there is one
    softcap: float  # times log2(e)
    sinks: Tensor | None
    offsets: Tensor | None
    offset_stride: int
    lengths: Tensor | None
    keep: Tensor | None  # uint8 (B, Nk)
    starts: Tensor | None


@dataclasses.dataclass(frozen=True)
class Features:
    """Compile-time features of a kernel."""

    DIM: int
    DIM_V: int
    PAD: int
    PAD_V: int
    SIZE: int  # keys of a block
    GROUP: int  # query heads to one key head
    BLOCK_M: int
    BLOCK_N: int
    SOFTCAP: bool
    LINEAR: bool  # the logit is the score times a positive factor
    OFFSET: bool
    LENGTHS: bool
    KEEP: bool
    PACKED: bool
    WIDE: bool  # offsets within a tile take 64 bits
    PRECISION: str
    ATOMIC: bool = False  # dK and dV through float32 atomics

    @property
    def PARTS(self) -> int:
        """Tiles of keys to one block."""
        return triton.cdiv(self.SIZE, self.BLOCK_N)


class KernelArguments(NamedTuple):
    """A call as kernels see it, besides operands."""

    sizes: Sizes
    modifiers: Modifiers
    features: Features
    far: bool  # some query has blocks to choose from

    def fit(self, pass_: str, query: Tensor, **features) -> tuple[Features, configs.Config]:
        """Features and config of the kernels of a pass."""
        F = self.features
        arch, width = shared.device_arch(query.device), max(F.PAD, F.PAD_V)
        config = configs.choose(arch, query.dtype, width, pass_, F.PRECISION == "ieee")
        block_n = min(config.block_n, padded(F.SIZE))
        F = dataclasses.replace(F, BLOCK_M=config.block_m, BLOCK_N=block_n, **features)
        return F, config

    def chunks(self, batch: int, width: int, item: int) -> list[Sizes]:
        """Sizes of each chunk, of which a slot takes `width` elements of `item` bytes."""
        sizes = self.sizes
        row = batch * sizes.heads * self.features.GROUP * sizes.top * width * item
        chunk = max(1, min(sizes.q_len, PART_BYTES // max(1, row)))
        starts = range(0, sizes.q_len, chunk)
        return [sizes._replace(chunk=chunk, start=start) for start in starts]


def describe(call: Call) -> KernelArguments:
    """Collect the arguments that all kernels share."""
    (heads, q_len, dim), (kv_heads, kv_len, dim_v) = call.query.shape[1:], call.value.shape[1:]
    blocks = triton.cdiv(kv_len, call.block_size)
    near, top = min(call.near, blocks), call.indices.shape[3]
    sizes = Sizes(kv_heads, q_len, kv_len, near, top, q_len, 0)
    softcap, offset = call.softcap, call.query_offset
    modifiers = Modifiers(
        scale=call.scale / softcap if softcap else call.scale * LOG2E,
        softcap=softcap * LOG2E,
        sinks=_contiguous(call.sinks),
        offsets=_contiguous(offset),
        offset_stride=0 if offset is None or offset.numel() == 1 else 1,
        lengths=_contiguous(call.kv_lengths),
        keep=None if call.key_mask is None else call.key_mask.contiguous().view(torch.uint8),
        starts=_contiguous(call.starts),
    )
    features = Features(
        DIM=dim,
        DIM_V=dim_v,
        PAD=padded(dim),
        PAD_V=padded(dim_v),
        SIZE=call.block_size,
        GROUP=heads // kv_heads,
        BLOCK_M=0,
        BLOCK_N=0,
        SOFTCAP=softcap > 0.0,
        LINEAR=call.scale > 0.0 and not softcap,
        OFFSET=offset is not None,
        LENGTHS=call.kv_lengths is not None,
        KEEP=call.key_mask is not None,
        PACKED=call.starts is not None,
        WIDE=max(x.stride(2) for x in (call.query, call.key, call.value)) >= WIDE,
        PRECISION=dot_precision(call.query.dtype),
    )
    return KernelArguments(sizes, modifiers, features, top > 0 and blocks - 1 > near)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
