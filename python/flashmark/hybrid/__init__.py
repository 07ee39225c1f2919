"""Hybrid attention, exact nearby and landmarks beyond: public functions, state, backends."""

from flashmark.hybrid.attention import HybridStatistics, hybrid_attention, hybrid_statistics
from flashmark.hybrid.state import HybridState

__all__ = ["HybridState", "HybridStatistics", "hybrid_attention", "hybrid_statistics"]
