"""Dense oracles: the definition of every operator in plain PyTorch, any dtype up to float64,
gradients by autograd.

Memory is quadratic and nothing is fast. Read these files to know what the fused backends compute.
"""

from flashmark.reference.block_sparse import block_sparse_attention, dropout_keep, philox4x32
from flashmark.reference.hybrid import hybrid_attention
from flashmark.reference.nystrom import landmark_core, nystrom_attention
from flashmark.reference.routed import block_scores, block_topk_attention, routed_attention
from flashmark.reference.variants import (
    first_k_attention,
    nystromformer_attention,
    segment_attention,
    sequence_to_sequence_attention,
)

__all__ = [
    "block_scores",
    "block_sparse_attention",
    "block_topk_attention",
    "dropout_keep",
    "first_k_attention",
    "hybrid_attention",
    "landmark_core",
    "nystrom_attention",
    "nystromformer_attention",
    "philox4x32",
    "routed_attention",
    "segment_attention",
    "sequence_to_sequence_attention",
]
