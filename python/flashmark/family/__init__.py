"""Other ways of attending through landmarks, each built from the operators of the package."""

from flashmark.family.first_k import first_k_attention
from flashmark.family.huggingface import NystromformerSelfAttention, convert_nystromformer
from flashmark.family.leaky import leaky_segment_attention
from flashmark.family.nystromformer import convolution_residual, nystromformer_attention
from flashmark.family.segment import segment_attention
from flashmark.family.sequence_to_sequence import (
    SequenceToSequence,
    cross_attention,
    sequence_to_sequence_attention,
    source_attention,
    target_attention,
)

__all__ = [
    "NystromformerSelfAttention",
    "SequenceToSequence",
    "convert_nystromformer",
    "convolution_residual",
    "cross_attention",
    "first_k_attention",
    "leaky_segment_attention",
    "nystromformer_attention",
    "segment_attention",
    "sequence_to_sequence_attention",
    "source_attention",
    "target_attention",
]
