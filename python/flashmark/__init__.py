"""Fused block-sparse and landmark attention for PyTorch, with one meaning on every device."""

from flashmark import masks, reference
from flashmark.block_sparse import block_sparse_attention
from flashmark.check import Report, check
from flashmark.config import show_config
from flashmark.dispatch import BackendUnavailable
from flashmark.landmarks import init_landmarks, landmark_core, landmark_parameter_groups
from flashmark.masks import BlockMask, compile_mask
from flashmark.nystrom import NystromState, nystrom_attention

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BlockMask",
    "NystromState",
    "Report",
    "block_sparse_attention",
    "check",
    "compile_mask",
    "init_landmarks",
    "landmark_core",
    "landmark_parameter_groups",
    "masks",
    "nystrom_attention",
    "reference",
    "show_config",
]
