"""Fused block-sparse and landmark attention for PyTorch, with one meaning on every device."""

import importlib

from flashmark import masks, reference
from flashmark.block_sparse import block_sparse_attention
from flashmark.causality import CausalityReport, check_causality
from flashmark.check import Report, check
from flashmark.config import show_config
from flashmark.dispatch import BackendUnavailable
from flashmark.hybrid import HybridState, HybridStatistics, hybrid_attention, hybrid_statistics
from flashmark.integrations.sdpa import scaled_dot_product_attention
from flashmark.masks import BlockMask, compile_mask
from flashmark.nystrom import NystromState, nystrom_attention
from flashmark.nystrom.landmark_core import (
    init_landmarks,
    landmark_core,
    landmark_parameter_groups,
)
from flashmark.routed import (
    RoutedState,
    Routing,
    block_scores,
    block_topk_attention,
    routed_attention,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BlockMask",
    "CausalityReport",
    "HybridState",
    "HybridStatistics",
    "NystromState",
    "Report",
    "RoutedState",
    "Routing",
    "block_scores",
    "block_sparse_attention",
    "block_topk_attention",
    "check",
    "check_causality",
    "compile_mask",
    "hybrid_attention",
    "hybrid_statistics",
    "init_landmarks",
    "landmark_core",
    "landmark_parameter_groups",
    "masks",
    "nystrom_attention",
    "reference",
    "routed_attention",
    "scaled_dot_product_attention",
    "show_config",
]


_ON_DEMAND = {
    "distributed", "family", "generation", "integrations", "models", "nn", "objectives",
    "variants",
}  # fmt: skip


def __getattr__(name: str):
    """`flashmark.nn` and the like, imported when they are first asked for."""
    if name in _ON_DEMAND:
        return importlib.import_module(f"flashmark.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
