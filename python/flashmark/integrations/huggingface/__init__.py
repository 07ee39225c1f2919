"""flashmark as an attention implementation of Hugging Face transformers (5.x).

    from flashmark.integrations import huggingface

    huggingface.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashmark")

Grouped heads, sliding windows, chunks, packed sequences, softcap, sinks, padding on either side,
relative biases, dropout and every cache of transformers work as they do with "eager", except that
rows which see no key (padding) are 0.

"flashmark_routed" is registered as well: each token reads the key blocks that it chooses, an
approximation that a trained model can use as it is. `register_routed` sets its options.
"""

from flashmark.integrations.huggingface.attention import attention, attention_mask, register
from flashmark.integrations.huggingface.convert import to_hybrid, to_nystrom
from flashmark.integrations.huggingface.routed import register_routed

__all__ = [
    "attention",
    "attention_mask",
    "register",
    "register_routed",
    "to_hybrid",
    "to_nystrom",
]
