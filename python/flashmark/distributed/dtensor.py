"""Sharding rules: which part of every argument belongs to a shard of the batch or of the heads.

The rules stand around the public functions, not on `torch.ops.flashmark.*`: a mask crosses that
boundary as lists of tiles, and the lists of some samples and heads are no shard of the lists of
all. Attention is independent over samples and heads, so the only communication is that which brings
an argument to its placement.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard

from flashmark.distributed.local_mask import select_leading
from flashmark.masks import BlockMask, Mask
from flashmark.masks.cache import compiled

Dimensions = dict[int, tuple[int | None, int | None]]
BATCH, HEADS = "batch", "heads"

#: dimension of the batch and of the heads, by argument and number of dimensions. A dimension of
#: size 1 that is broadcast stays whole. Arguments not named are the same for every shard.
DIMENSIONS: dict[str, Dimensions] = {
    "query": {4: (0, 1)},
    "key": {4: (0, 1)},
    "value": {4: (0, 1)},
    "bias": {2: (None, 0), 4: (0, 1)},
    "sinks": {1: (None, 0)},
    "query_offset": {1: (0, None)},
    "kv_lengths": {1: (0, None)},
    "landmarks": {3: (None, 0), 4: (0, 1)},
    "core": {3: (None, 0), 4: (0, 1)},
    "decay": {2: (None, 0)},
    "key_mask": {2: (0, None)},
    "gate": {3: (None, 0), 4: (0, 1)},
    "indices": {4: (0, 1)},
    "scores": {4: (0, 1)},
}
#: of a tensor in a state
STATE: Dimensions = {1: (0, None), 2: (0, None), 3: (0, 1), 4: (0, 1), 5: (0, 1)}
DIMENSIONS |= {"state": STATE, "state_out": STATE}
_LANDMARKS = ("landmark_queries", "landmark_keys")
BROADCAST = ("bias", "query_offset", "gate")


class _Shards(NamedTuple):
    """Division of a call over the mesh: BATCH, HEADS or None for each mesh dimension."""

    mesh: DeviceMesh
    roles: list[str | None]

    def placements(self, dims: tuple[int | None, int | None]) -> list[Placement]:
        """Placements of a tensor whose batch and heads are these dimensions."""
        by_role: dict[str | None, int | None] = {BATCH: dims[0], HEADS: dims[1]}
        found = [by_role.get(role) for role in self.roles]
        return [Replicate() if dim is None else Shard(dim) for dim in found]

    def of_gradient(self, dims: tuple[int | None, int | None]) -> list[Placement]:
        """Shards of one whole tensor each have a share of its gradient."""
        return [
            Partial() if role is not None and placement.is_replicate() else placement
            for role, placement in zip(self.roles, self.placements(dims), strict=True)
        ]

    def count(self, role: str) -> int:
        sizes = [self.mesh.size(n) for n, r in enumerate(self.roles) if r == role]
        return int(torch.tensor(sizes).prod()) if sizes else 1

    def members(self, size: int, role: str) -> Tensor:
        """Indices of the samples or heads, out of `size`, that this shard has."""
        whole = DTensor.from_local(torch.arange(size), self.mesh, [Replicate()] * self.mesh.ndim)
        dims = (0, None) if role == BATCH else (None, 0)
        return whole.redistribute(placements=self.placements(dims)).to_local()


def call_on_shards(function, *args, **kwargs):
    """`function` of the shards. Outputs are DTensors placed like `query`.

    Shard(0) and Shard(1) of `query` divide batch and heads, of everything. Arguments come to the
    placement that goes with it; plain tensors are taken to be the same on every rank. Where
    `query` itself is a plain tensor, it is a shard already, and so is the local part of any
    DTensor: of a module's parameters under tensor parallelism.
    """
    named = inspect.signature(function).bind(*args, **kwargs).arguments
    if "query" not in named:
        return _core_on_shards(function, named)
    query = named["query"]
    if not isinstance(query, DTensor):
        return function(**pytree.tree_map_only(DTensor, local_part, dict(named)))
    shards = _Shards(query.device_mesh, [_role(p) for p in query.placements])
    _check(named, shards)
    batch = query.shape[0]
    local = {
        name: _mask(x, shards, named) if name == "mask" else _shard(name, x, shards)
        for name, x in named.items()
    }
    outputs = function(**local)

    def whole(x: Tensor) -> DTensor:
        shape, dims = list(x.shape), STATE[x.dim()]  # those of outputs as well
        if BATCH in shards.roles:
            shape[0] = batch
        if dims[1] is not None:
            shape[1] *= shards.count(HEADS)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            x.contiguous(), shards.mesh, shards.placements(dims), shape=torch.Size(shape),
            stride=stride,
        )  # fmt: skip

    return pytree.tree_map_only(Tensor, whole, outputs)


def _core_on_shards(function, named: dict):
    """`landmark_core`: leading dimensions may be shards, the matrices are whole."""
    first = named["landmark_queries"]
    split = first.dim() - 2
    placements = [
        p if isinstance(p, Shard) and p.dim < split else Replicate() for p in first.placements
    ]
    local = {
        name: local_part(x.redistribute(first.device_mesh, placements)) if name in _LANDMARKS else x
        for name, x in named.items()
        if x is not None
    }
    core = function(**local)
    shape = torch.Size((*first.shape[:-1], first.shape[-2]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(core, first.device_mesh, placements, shape=shape, stride=stride)


def _role(placement: Placement) -> str | None:
    if placement.is_shard(0):
        return BATCH
    if placement.is_shard(1):
        return HEADS
    if isinstance(placement, Shard):
        raise ValueError(
            f"query: expected shards of dimension 0 (batch) or 1 (heads), got {placement}; for "
            "shards of the sequence see flashmark.distributed"
        )
    return None


def _check(named: dict, shards: _Shards) -> None:
    if named.get("dropout_p"):
        raise NotImplementedError(
            f"dropout_p: expected 0.0 with DTensors, got {named['dropout_p']}"
        )
    kv_heads, ranks = named["key"].shape[1], shards.count(HEADS)
    if kv_heads % ranks:
        raise ValueError(
            f"key: expected a number of heads that {ranks} shards divide, got {kv_heads}"
        )
    if named.get("cu_seqlens") is not None and BATCH in shards.roles:
        raise ValueError("cu_seqlens: expected no shards of the batch, got Shard(0)")


def _shard(name: str, value, shards: _Shards):
    """This shard's part of an argument: of a tensor, or of the tensors in a tuple."""
    if isinstance(value, tuple | list):
        parts = [_shard(name, x, shards) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, Tensor):
        return value
    dims = DIMENSIONS.get(name, {}).get(value.dim(), (None, None))
    if name in BROADCAST:
        batch, heads = (None if d is None or value.shape[d] == 1 else d for d in dims)
        dims = batch, heads
    placements = shards.placements(dims)
    if not isinstance(value, DTensor):
        replicated = [Replicate()] * shards.mesh.ndim
        value = DTensor.from_local(value, shards.mesh, replicated, run_check=False)
    if name == "state_out" and list(value.placements) != placements:
        raise ValueError(
            f"state_out: expected placements {placements} like query, got {value.placements}"
        )
    value = value.redistribute(shards.mesh, placements)
    return local_part(value, shards.of_gradient(dims))


def local_part(x: DTensor, gradient: list[Placement] | None = None) -> Tensor:
    """This rank's part; its gradient has the placements `gradient`, or those of `x`."""
    part = x.to_local(grad_placements=gradient)
    return part.wait() if hasattr(part, "wait") else part


def _mask(mask, shards: _Shards, named: dict):
    """The mask of this shard's samples and heads."""
    batch, heads, q_len = named["query"].shape[:3]
    kv_len, device = named["key"].shape[2], named["query"].device
    if isinstance(mask, Mask):
        if mask.dims(batch, heads) == (1, 1):
            return mask
        rows = q_len if named.get("query_offset") is None else kv_len
        mask = compiled(mask, batch, heads, rows, kv_len, device)
    if not isinstance(mask, BlockMask) or (mask.batch, mask.heads) == (1, 1):
        return mask
    index = [
        shards.members(size, role) if size > 1 else torch.zeros(1, dtype=torch.long)
        for size, role in ((mask.batch, BATCH), (mask.heads, HEADS))
    ]
    return select_leading(mask, *index)
