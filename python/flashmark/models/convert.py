"""Weights of Hugging Face models (T5, GPT-2, Llama) in ours. transformers is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashmark.models.decoder import Decoder, DecoderConfig
from flashmark.models.t5 import T5
from flashmark.models.t5_layers import T5Config

_OWN = re.compile(r"\.attention\.(landmark|gate)|\.convolution\.")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def from_huggingface(model: nn.Module, **options) -> T5 | Decoder:
    """Our model with the weights of T5ForConditionalGeneration, GPT2LMHeadModel, LlamaForCausalLM.

    Args:
        model: any size. Options of it that change the mathematics and are not known here are a
            NotImplementedError. Dropout is not taken over.
        options: fields of our config to set differently, `attention` for example.

    Returns:
        T5 or Decoder in the dtype, on the device and in the mode (training or eval) of `model`.
    """
    kind = getattr(model.config, "model_type", None)
    if kind not in _CONFIGS:
        raise NotImplementedError(
            f"model: expected a t5, gpt2 or llama model, got {kind or type(model).__name__}"
        )
    ours = (T5 if kind == "t5" else Decoder)(_CONFIGS[kind](model.config, options))
    state = converted(kind, model.state_dict())
    if getattr(ours, "head", None) is None:
        state.pop("head.weight", None)
    first = next(model.parameters())
    ours = ours.to(first.device, first.dtype).train(model.training)
    for name, parameter in ours.named_parameters():
        if name in state:  # T5 in float16 keeps some weights in float32
            parameter.data = parameter.data.to(state[name].dtype)
    # not strict: what `options` add to the original keeps its initial weights
    missing, unexpected = ours.load_state_dict(state, strict=False)
    missing = [name for name in missing if not _OWN.search(name)]
    if missing or unexpected:
        raise ValueError(
            f"model: expected the weights of a {kind} model, got "
            f"{len(missing)} missing and {len(unexpected)} unknown ({(missing + unexpected)[0]})"
        )
    return ours


def converted(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names: weights of a Hugging Face model, or gradients by its names."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(theirs, name), ours) for theirs, ours in _NAMES[kind])
        match, ours = next((pair for pair in matches if pair[0]), (None, None))
        if match is None:
            raise ValueError(f"tensors: expected the names of a {kind} model, got {name!r}")
        if ours is None:
            continue
        if kind == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            tensor = tensor.T.contiguous()  # stored as (in, out)
        found[match.expand(ours)] = tensor
    return _joined(found)


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's separate projections of query, key and value as the rows of one layer."""
    for name in [name for name in tensors if ".query_rows." in name]:
        parts = (name.replace("query_rows", f"{part}_rows") for part in ("query", "key", "value"))
        tensors[name.replace("query_rows", "qkv")] = torch.cat([tensors.pop(x) for x in parts])
    return tensors


_NAMES: dict[str, list[tuple[str, str | None]]] = {
    "t5": [
        (r"(?:encoder|decoder)\.embed_tokens\.weight", None),  # the same as shared
        (r"shared\.weight", r"embed.weight"),
        (r"lm_head\.weight", r"head.weight"),
        (r"(\w+)\.final_layer_norm\.weight", r"\1.norm.weight"),
        (r"(\w+)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
         r"\1.bias.embedding.weight"),
        *[(rf"(\w+)\.block\.(\d+)\.layer\.{n}\.{theirs}\.{part}\.weight",
           rf"\1.layers.\2.{ours}.{name}.weight")
          for n, theirs, ours in ((0, "SelfAttention", "attention"),
                                  (1, "EncDecAttention", "cross_attention"))
          for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))],
        *[(rf"(\w+)\.block\.(\d+)\.layer\.\d\.DenseReluDense\.{part}\.weight",
           rf"\1.layers.\2.mlp.{name}.weight")
          for part, name in (("wi", "up"), ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))],
        (r"(\w+)\.block\.(\d+)\.layer\.0\.layer_norm\.weight",
         r"\1.layers.\2.attention_norm.weight"),
        (r"decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight",
         r"decoder.layers.\1.cross_norm.weight"),
        (r"(\w+)\.block\.(\d+)\.layer\.\d\.layer_norm\.weight",
         r"\1.layers.\2.mlp_norm.weight"),
    ],
    "gpt2": [
        (r"transformer\.wte\.weight", r"embed.weight"),
        (r"transformer\.wpe\.weight", r"positions.weight"),
        (r"lm_head\.weight", r"head.weight"),
        (r"transformer\.ln_f\.(\w+)", r"norm.\1"),
        *[(rf"transformer\.h\.(\d+)\.{theirs}\.(weight|bias)", rf"layers.\1.{ours}.\2")
          for theirs, ours in ((r"ln_1", "attention_norm"), (r"ln_2", "mlp_norm"),
                               (r"attn\.c_attn", "attention.qkv"),
                               (r"attn\.c_proj", "attention.out"),
                               (r"mlp\.c_fc", "mlp.up"), (r"mlp\.c_proj", "mlp.down"))],
    ],
    "llama": [
        (r"model\.embed_tokens\.weight", r"embed.weight"),
        (r"lm_head\.weight", r"head.weight"),
        (r"model\.norm\.weight", r"norm.weight"),
        *[(rf"model\.layers\.(\d+)\.{theirs}\.(weight|bias)", rf"layers.\1.{ours}.\2")
          for theirs, ours in ((r"input_layernorm", "attention_norm"),
                               (r"post_attention_layernorm", "mlp_norm"),
                               (r"self_attn\.q_proj", "attention.query_rows"),
                               (r"self_attn\.k_proj", "attention.key_rows"),
                               (r"self_attn\.v_proj", "attention.value_rows"),
                               (r"self_attn\.o_proj", "attention.out"),
                               (r"mlp\.up_proj", "mlp.up"), (r"mlp\.gate_proj", "mlp.gate"),
                               (r"mlp\.down_proj", "mlp.down"))],
    ],
}  # fmt: skip


def _activation(name: str) -> str:
    return _ACTIVATIONS.get(name, name)


def _known(config, **expected) -> None:
    for name, value in expected.items():
        if getattr(config, name, value) != value:
            raise NotImplementedError(
                f"model: expected {name}={value} in its config, got {getattr(config, name)}"
            )


def _t5(config, options: dict) -> T5Config:
    return T5Config(**{
        "vocab_size": config.vocab_size, "width": config.d_model, "heads": config.num_heads,
        "head_dim": config.d_kv, "hidden": config.d_ff, "encoder_layers": config.num_layers,
        "decoder_layers": config.num_decoder_layers,
        "activation": _activation(config.dense_act_fn), "gated": config.is_gated_act,
        "buckets": config.relative_attention_num_buckets,
        "max_distance": config.relative_attention_max_distance,
        "norm_eps": config.layer_norm_epsilon,
        "tied": config.tie_word_embeddings,
        "scale_outputs": getattr(config, "scale_decoder_outputs", config.tie_word_embeddings),
        "padding_token": config.pad_token_id,
        "start_token": getattr(config, "decoder_start_token_id", None),
    } | options)  # fmt: skip


def _gpt2(config, options: dict) -> DecoderConfig:
    _known(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
           add_cross_attention=False)  # fmt: skip
    return DecoderConfig(**{
        "vocab_size": config.vocab_size, "width": config.n_embd, "layers": config.n_layer,
        "heads": config.n_head, "hidden": config.n_inner or 4 * config.n_embd,
        "positions": "learned", "max_length": config.n_positions, "norm": "layer",
        "norm_eps": config.layer_norm_epsilon,
        "activation": _activation(config.activation_function), "gated": False, "bias": True,
        "tied": config.tie_word_embeddings,
    } | options)  # fmt: skip


def _llama(config, options: dict) -> DecoderConfig:
    _known(config, attention_bias=False, mlp_bias=False)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise NotImplementedError(
            f"model: expected rope_type='default' in its config, got {rope['rope_type']!r}"
        )
    return DecoderConfig(**{
        "vocab_size": config.vocab_size, "width": config.hidden_size,
        "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "hidden": config.intermediate_size, "positions": "rotary",
        "rotary_theta": rope.get("rope_theta", 10_000.0), "rotary_dim": config.head_dim,
        "max_length": config.max_position_embeddings, "norm": "rms",
        "norm_eps": config.rms_norm_eps, "activation": _activation(config.hidden_act),
        "gated": True, "tied": config.tie_word_embeddings,
    } | options)  # fmt: skip


_CONFIGS = {"t5": _t5, "gpt2": _gpt2, "llama": _llama}
