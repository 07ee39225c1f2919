"""Tensor parallelism through `flashmark.nn`: heads divided over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from flashmark.nn.projected import ProjectedAttention


class HeadwiseParallel(ParallelStyle):
    """For an attention module of `flashmark.nn`: each rank computes some of the heads.

    `qkv` becomes column-wise and `out` row-wise; landmarks, sinks and other parameters with a
    leading dimension of heads become shards of it. Input and output are whole on every rank, in
    plain tensors: one all-reduce forward, one backward. Caches hold the rank's own heads.

    The rows of `qkv` are reordered, so that each rank's are the queries, keys and values of its
    heads: `head_order` gives the order, for state dicts.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, ProjectedAttention):
            raise TypeError(
                f"module: expected an attention module of flashmark.nn, got {type(module).__name__}"
            )
        ranks, heads = device_mesh.size(), (module.num_heads, module.num_kv_heads)
        if heads[1] % ranks:
            raise ValueError(
                f"module: expected a number of key heads that {ranks} ranks divide, got {heads[1]}"
            )
        mask = getattr(module, "mask", None)
        if mask is not None and mask.dims(1, heads[0])[1] != 1:
            raise NotImplementedError(
                f"module: expected one mask for all heads, got {mask!r}, which depends on the head"
            )
        order = head_order(*heads, module.head_dim, ranks)
        with torch.no_grad():
            for parameter in module.qkv.parameters():
                parameter.copy_(parameter[order.to(parameter.device)])
        plan = {"qkv": ColwiseParallel(), "out": RowwiseParallel()}
        plan |= {
            name: ColwiseParallel()
            for name, layer in module.named_children()
            if isinstance(layer, nn.Linear) and layer.out_features == heads[0] and name not in plan
        }
        parallelize_module(module, device_mesh, plan)
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(
                distribute_tensor(parameter.detach(), device_mesh, [Shard(0)]),
                requires_grad=parameter.requires_grad,
            )
            vars(sharded).update(vars(parameter))  # the mark of landmarks
            setattr(module, name, sharded)
        module.num_heads, module.num_kv_heads = (n // ranks for n in heads)
        return module


def head_order(num_heads: int, num_kv_heads: int, head_dim: int, ranks: int) -> Tensor:
    """Rows of `qkv` in the order in which `HeadwiseParallel` keeps them: new[i] = old[order[i]]."""
    rows = torch.arange((num_heads + 2 * num_kv_heads) * head_dim)
    parts = rows.split([n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)])
    return torch.cat([part.view(ranks, -1) for part in parts], 1).flatten()


def tensor_parallel_plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for `parallelize_module` that divides the heads of every attention module.

    It leaves all other layers whole; add entries for them (a column-wise and a row-wise linear
    layer make a feed-forward network). Where `module` is itself such an attention, its plan is a
    `HeadwiseParallel()`.
    """
    return {
        name: HeadwiseParallel()
        for name, part in module.named_modules()
        if isinstance(part, ProjectedAttention) and name
    }
