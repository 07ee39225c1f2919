"""Attention as drop-in modules, from (B, N, embed_dim) to the same shape."""

from flashmark.nn.block_sparse import BlockSparseAttention
from flashmark.nn.cache import KeyValueCache, StateCache
from flashmark.nn.cross import CrossAttention, Memory
from flashmark.nn.hybrid import HybridAttention
from flashmark.nn.nystrom import NystromAttention
from flashmark.nn.projected import ProjectedAttention
from flashmark.nn.rotary import apply_rotary, rotary_angles
from flashmark.nn.routed import RoutedAttention, RoutedCache

__all__ = [
    "BlockSparseAttention",
    "CrossAttention",
    "HybridAttention",
    "KeyValueCache",
    "Memory",
    "NystromAttention",
    "ProjectedAttention",
    "RoutedAttention",
    "RoutedCache",
    "StateCache",
    "apply_rotary",
    "rotary_angles",
]
