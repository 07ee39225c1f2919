"""One attention over many processes, on torch.distributed.

Importing this package imports no DTensor: `HeadwiseParallel` and `tensor_parallel_plan` do when
they are first asked for, and calls with DTensors come to their rules by themselves.
"""

from flashmark.distributed.collectives import shard, unshard
from flashmark.distributed.context import context_parallel_block_sparse_attention
from flashmark.distributed.hybrid import context_parallel_hybrid_attention
from flashmark.distributed.nystrom import context_parallel_nystrom_attention
from flashmark.distributed.plan import ContextPlan, balance, token_bytes
from flashmark.distributed.routed import context_parallel_routed_attention

_TENSOR_PARALLEL = ("HeadwiseParallel", "head_order", "tensor_parallel_plan")

__all__ = [
    "ContextPlan",
    "HeadwiseParallel",
    "balance",
    "context_parallel_block_sparse_attention",
    "context_parallel_hybrid_attention",
    "context_parallel_nystrom_attention",
    "context_parallel_routed_attention",
    "head_order",
    "shard",
    "tensor_parallel_plan",
    "token_bytes",
    "unshard",
]


def __getattr__(name: str):
    if name not in _TENSOR_PARALLEL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashmark.distributed import tensor_parallel

    return getattr(tensor_parallel, name)
