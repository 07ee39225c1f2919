"""Causal Nyström attention: public function, state, landmark core, operator, backends."""

from flashmark.nystrom.attention import nystrom_attention
from flashmark.nystrom.state import NystromState

__all__ = ["NystromState", "nystrom_attention"]
