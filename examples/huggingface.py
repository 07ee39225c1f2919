"""Five small random models of transformers: eager attention against flashmark.

    python examples/huggingface.py

prints, for each, the largest difference of logits and of gradients relative to the largest of each
tensor, and whether greedy generation gives the same tokens, with and without padding, with dynamic
and static caches and with none.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from flashmark.integrations import huggingface

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def gpt2() -> transformers.PreTrainedModel:
    special = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=128, **special
    )
    return transformers.GPT2LMHeadModel(config)


def gemma2() -> transformers.PreTrainedModel:
    """Softcap, and a sliding window in every other layer."""
    config = transformers.Gemma2Config(
        **SIZES, sliding_window=7, attn_logit_softcapping=5.0, query_pre_attn_scalar=8
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss() -> transformers.PreTrainedModel:
    """Sinks, and a sliding window in every other layer."""
    config = transformers.GptOssConfig(
        **SIZES, sliding_window=7, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None
    )
    return transformers.GptOssForCausalLM(config)


def t5() -> transformers.PreTrainedModel:
    """Encoder and decoder with a learned relative bias."""
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=0,
        eos_token_id=None, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"Llama": llama, "GPT-2": gpt2, "Gemma-2": gemma2, "gpt-oss": gpt_oss, "T5": t5}
PADDINGS = ("none", "left", "right")
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


def build(name: str) -> transformers.PreTrainedModel:
    """In eval mode, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 or parameter.numel() <= 4:  # matrices and sinks
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(padding: str, *, batch: int = 3, length: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, : length // 3] = 0
    if padding == "right":
        mask[1, -(length // 3) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(
    model: transformers.PreTrainedModel, implementation: str, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Logits of the tokens that are not padding, and the gradients of their sum of squares."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    kept = given["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        logits = model(**given, decoder_input_ids=given["input_ids"]).logits
    else:
        logits = model(**given).logits[kept]
    logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | found


def difference(ours: Tensor, theirs: Tensor) -> float:
    largest = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
    return float((ours - theirs).abs().max() / largest)


def generate(
    model: transformers.PreTrainedModel, implementation: str, given: dict[str, Tensor], cache: str
) -> Tensor:
    model.set_attn_implementation(implementation)
    return model.generate(**given, max_new_tokens=12, do_sample=False, **CACHES[cache])


def main() -> None:
    transformers.logging.set_verbosity_error()
    huggingface.register()
    print("| model | padding | logits | gradients | greedy tokens |\n|---|---|---|---|---|")
    for name in MODELS:
        for padding in PADDINGS:
            model, given = build(name), inputs(padding)
            theirs = logits_and_gradients(model, "eager", given)
            ours = logits_and_gradients(model, "flashmark", given)
            off = {key: difference(ours[key], theirs[key]) for key in theirs}
            logits, tokens = off.pop("logits"), "-"
            if padding != "right" or model.config.is_encoder_decoder:
                equal = [
                    torch.equal(*(generate(model, x, given, cache) for x in ("eager", "flashmark")))
                    for cache in CACHES
                ]
                tokens = "identical" if all(equal) else f"differ: {equal}"
            print(f"| {name} | {padding} | {logits:.1e} | {max(off.values()):.1e} | {tokens} |")


if __name__ == "__main__":
    main()
