"""One description of a call of attention over chosen blocks: what validation makes and backends
take."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """All checked arguments, in the order of the operator's schema.

    Query i sits at key p = offset + i (i + Nk - Nq without an offset), in block (p - start) //
    block_size of its sequence. It sees keys j <= p of that block, of the `near` blocks before it,
    and of the blocks in `indices` before those.
    """

    query: Tensor  # (B, Hq, Nq, D), like key and value with stride 1 in the last dimension
    key: Tensor  # (B, Hkv, Nk, D)
    value: Tensor  # (B, Hkv, Nk, Dv)
    indices: (
        Tensor  # int32 (B, Hkv, Nq, K): blocks counted from their sequence's start; others: none
    )
    block_size: int
    near: int
    scale: float
    sinks: Tensor | None = None  # (Hq,)
    query_offset: Tensor | None = None  # int32 (1,) or (B,)
    kv_lengths: Tensor | None = None  # int32 (B,)
    key_mask: Tensor | None = None  # bool (B, Nk)
    starts: Tensor | None = None  # int32 (Nk,): first token of each token's sequence; None: 0
    softcap: float = 0.0  # 0.0: none
    deterministic: bool = True  # bitwise repeatable gradients


class Saved(NamedTuple):
    """Outputs of the forward, which the backward reads again."""

    out: Tensor  # (B, Hq, Nq, Dv)
    lse: Tensor  # (B, Hq, Nq), float32 or float64


class Grads(NamedTuple):
    """Gradients of the fields of a call; None where there is no such field."""

    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    dsinks: Tensor | None
