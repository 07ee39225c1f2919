"""Routed attention: landmarks choose key blocks, exact attention reads them."""

from flashmark.routed.attention import block_topk_attention
from flashmark.routed.mass import Routing
from flashmark.routed.routing import block_scores, routed_attention
from flashmark.routed.summaries import RoutedState

__all__ = [
    "RoutedState",
    "Routing",
    "block_scores",
    "block_topk_attention",
    "routed_attention",
]
