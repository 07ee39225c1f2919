"""Other ways of attending through landmarks, each built from the operators of the package."""

from flashmark.integrations.huggingface.nystromformer import (
    NystromformerSelfAttention,
    convert_nystromformer,
)
from flashmark.variants.first_k import FirstKState, first_k_attention
from flashmark.variants.nystromformer import convolution_residual, nystromformer_attention
from flashmark.variants.segment import SegmentState, segment_attention
from flashmark.variants.sequence_to_sequence import (
    SequenceToSequence,
    cross_attention,
    sequence_to_sequence_attention,
    source_attention,
    target_attention,
)

__all__ = [
    "FirstKState",
    "NystromformerSelfAttention",
    "SegmentState",
    "SequenceToSequence",
    "convert_nystromformer",
    "convolution_residual",
    "cross_attention",
    "first_k_attention",
    "nystromformer_attention",
    "segment_attention",
    "sequence_to_sequence_attention",
    "source_attention",
    "target_attention",
]
