"""Tokens from a model with a cache: sampled, streamed, by beams, with a draft; many in parallel."""

from flashmark.generation.assisted import generate_assisted
from flashmark.generation.beams import Beams, beam_search
from flashmark.generation.parallel import predict_in_parallel
from flashmark.generation.prompts import CachedModel
from flashmark.generation.sampling import generate, stream

__all__ = [
    "Beams",
    "CachedModel",
    "beam_search",
    "generate",
    "generate_assisted",
    "predict_in_parallel",
    "stream",
]
