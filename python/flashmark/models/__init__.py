"""Small, complete models on flashmark's attention."""

from flashmark.models.convert import from_huggingface
from flashmark.models.decoder import Decoder, DecoderConfig
from flashmark.models.decoder_cache import DecoderCache, GivenMemory
from flashmark.models.masked_lm import MaskedLM
from flashmark.models.routed import record_routing, routing_losses, to_routed
from flashmark.models.t5 import T5, GivenSource, T5Cache, T5Output
from flashmark.models.t5_layers import T5Config

__all__ = [
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "GivenMemory",
    "GivenSource",
    "MaskedLM",
    "T5",
    "T5Cache",
    "T5Config",
    "T5Output",
    "from_huggingface",
    "record_routing",
    "routing_losses",
    "to_routed",
]
