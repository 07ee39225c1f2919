"""Attention modules of transformers with landmarks: their parameters and their computation."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flashmark.autograd import reached
from flashmark.hybrid import hybrid_attention
from flashmark.integrations.huggingface.masks import LazyMask, TracedMask
from flashmark.integrations.huggingface.state import StateLayer, Tokens, state_layer
from flashmark.masks.positions import is_plain_causal
from flashmark.nn.projected import NUMBERS
from flashmark.nystrom import nystrom_attention
from flashmark.nystrom.checks import wide_landmarks
from flashmark.nystrom.landmark_core import init_landmarks, landmark_core, mark_landmarks

FIELD = "flashmark_attention"  # of a model's configuration: a list of conversions


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Record of a `to_nystrom` or `to_hybrid` conversion in the configuration of a model."""

    kind: str  # "nystrom" or "hybrid"
    landmarks: int
    layers: list[int]
    window: int | None = None


class LandmarkModule(nn.Module):
    """Landmarks (Hkv, M, D) of an attention module, as a module that PEFT finds by its name.

    They are called `bias` because training scripts, the Trainer of transformers among them, go by
    its name to decide which parameters decay. Their first values depend on `seed` alone.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        seed: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.seed = seed
        self.bias = mark_landmarks(nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias.is_meta:
            return
        generator = torch.Generator().manual_seed(self.seed)
        self.bias.copy_(init_landmarks(*self.bias.shape, generator=generator, device="cpu"))

    def forward(self, query: Tensor) -> Tensor:
        """The landmarks. PEFT's wrappers look at the batch of `query`."""
        return self.bias


class Call(NamedTuple):
    """Arguments that a converted module passes to its attention function."""

    layer: StateLayer | None
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines (B | 1, N, width)


@dataclasses.dataclass(frozen=True)
class Converted:
    """Settings of a converted module's attention: its attribute `flashmark`."""

    window: int | None  # None: Nyström attention
    rotary: float | None  # factor of cosines and sines; None: no rotary embedding


def attention_modules(model: nn.Module) -> Iterator[Any]:
    """Causal self-attention modules that call the AttentionInterface of transformers."""
    for module in model.modules():
        causal = getattr(module, "is_causal", None) is True
        if causal and isinstance(getattr(module, "layer_idx", None), int):
            if hasattr(module, "config") and _head_dim(module) is not None:
                yield module


def _head_dim(module: Any) -> Any:
    return getattr(module, "head_dim", getattr(module, "head_size", None))


def is_converted(module: nn.Module) -> bool:
    return "landmarks" in module._modules and hasattr(module, "flashmark")


def refusal(module: Any, kind: str) -> str | None:
    """Why this attention module cannot be converted: expected and got."""
    forward = inspect.unwrap(type(module).forward)
    parameters, names = inspect.signature(forward).parameters, forward.__code__.co_names
    kinds = getattr(module.config, "layer_types", None)
    layer = kinds[module.layer_idx] if kinds else "full_attention"
    window = None if kinds else getattr(module.config, "sliding_window", None)
    if layer != "full_attention" or window is not None:
        got = layer if window is None else f"a sliding window of {window}"
        return f"full attention, got {got}"
    if getattr(module.config, "attn_logit_softcapping", None) is not None:
        return "no softcap, got attn_logit_softcapping"
    if hasattr(module, "sinks"):
        return "no attention sinks, got some"
    if hasattr(module, "kv_lora_rank"):
        return "keys of the queries' own heads, got latent ones"
    if not any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        return "modules that hand keywords to their attention function, got one that does not"
    if "position_embeddings" not in parameters:
        if any("rotary" in name or "rope" in name for name in names):
            return "rotary positions given to the module as position_embeddings, got its own"
    elif kind == "hybrid" and "apply_rotary_pos_emb" not in names:
        return "rotary positions applied by apply_rotary_pos_emb, got others"
    return None


def attach(model: nn.Module, module: Any, conversion: Conversion) -> None:
    """Add landmarks to an attention module of `model`, and the hook that prepares its calls."""
    heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    shape = kv_heads, conversion.landmarks, _head_dim(module)
    dtype, device = _place(model, module)
    factor = None
    if "position_embeddings" in inspect.signature(type(module).forward).parameters:
        factor = _rotary_factor(model)
    module.landmarks = LandmarkModule(shape, module.layer_idx, dtype=dtype, device=device)
    module.flashmark = Converted(conversion.window, factor)
    module.register_forward_pre_hook(_prepare, with_kwargs=True)


def _place(model: nn.Module, module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device that a module computes in, whatever its weights are stored as."""
    near, far = list(module.parameters()), list(model.parameters())
    dtype = next((x.dtype for x in near + far if x.dtype in NUMBERS), torch.get_default_dtype())
    device = next((x.device for x in near + far), torch.get_default_device())
    return dtype, device


def _rotary_factor(model: nn.Module) -> float:
    """Factor on cosines and sines (YaRN and its relatives)."""
    factors = {
        float(scaling)
        for module in model.modules()
        if isinstance(scaling := getattr(module, "attention_scaling", None), int | float)
    }
    if len(factors) > 1:
        raise NotImplementedError(
            f"model: expected one attention_scaling of rotary positions, got {sorted(factors)}"
        )
    return factors.pop() if factors else 1.0


def _prepare(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before a converted module runs: find its cache, remove or record its rotation."""
    from flashmark.integrations.huggingface.pretrained import check_implementation

    check_implementation(module.config._attn_implementation)
    given = (*args, *kwargs.values())  # transformers has several names for it
    cache = next((x for x in given if isinstance(x, Cache)), None)
    layer = state_layer(cache, module.layer_idx)
    rotation = None
    if module.flashmark.rotary is not None:
        rotation = kwargs.get("position_embeddings")
        if not (isinstance(rotation, tuple) and len(rotation) == 2):
            raise NotImplementedError(
                "position_embeddings: expected a pair of cosines and sines by keyword, "
                f"got {type(rotation).__name__}"
            )
        if module.flashmark.window is None:
            cos, sin = rotation
            still = torch.full_like(cos, module.flashmark.rotary), torch.zeros_like(sin)
            kwargs = kwargs | {"position_embeddings": still}
    return args, kwargs | {"flashmark": Call(layer, rotation)}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scale: float | None,
    call: Call | None,
    **unsupported: Tensor | float | None,
) -> Tensor:
    """(B, Hq, N, Dv), what the attention function computes for a converted module."""
    for name, given in unsupported.items():
        if given is not None:
            raise NotImplementedError(f"{name}: expected None with landmark attention, got one")
    if call is None:
        raise NotImplementedError(
            "model: expected attention modules that hand keywords to their attention function, "
            f"got {type(module).__name__}"
        )
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    landmarks = module.landmarks(query)
    keep = _takes_part(attention_mask, key.shape[2])
    if module.flashmark.window is None:
        function = _nystrom(query, landmarks, scale, call.layer)
    else:
        if call.rotation is not None:
            query, key, landmarks = _beside(module, query, key, landmarks, call.rotation)
        function = _hybrid(query, landmarks, scale, module.flashmark.window)
    tokens = Tokens(key, value, keep)
    if call.layer is not None:
        return call.layer.consume(tokens, function)
    return reached(function(tokens), landmarks)


Attend = Callable[..., Any]  # (tokens) -> output; (tokens, state, True) -> output, state


def _nystrom(query: Tensor, landmarks: Tensor, scale: float, layer: StateLayer | None) -> Attend:
    core = None if layer is None else layer.core
    if core is None:
        landmarks, _ = wide_landmarks(landmarks, landmarks, query.dtype)
        core = landmark_core(landmarks, scale=scale)
    if layer is not None:
        layer.core = core

    def function(tokens: Tokens, state: Any = None, return_state: bool = False) -> Any:
        key, value, keep = tokens
        # tokens that are replayed for their state need no queries
        queries = query if query.shape[2] == key.shape[2] else key
        return nystrom_attention(
            queries, key, value, landmarks, core=core, scale=scale, key_mask=keep, state=state,
            return_state=return_state,
        )  # fmt: skip

    return function


def _hybrid(query: Tensor, landmarks: Tensor, scale: float, window: int) -> Attend:
    def function(tokens: Tokens, state: Any = None, return_state: bool = False) -> Any:
        key, value, keep = tokens
        queries = query if query.shape[2] == key.shape[2] else key
        options: dict[str, Any] = {
            "window": window, "scale": scale, "state": state, "return_state": return_state,
        }  # fmt: skip
        if keep is None:
            return hybrid_attention(queries, key, value, landmarks, **options)
        # Chunks are cut by position, so tokens that take no part are taken out, not masked.
        bounds = F.pad(keep.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
        queries, key, value = (
            x.transpose(1, 2)[keep].transpose(0, 1)[None] for x in (queries, key, value)
        )
        found = hybrid_attention(queries, key, value, landmarks, cu_seqlens=bounds, **options)
        out, state = found if return_state else (found, None)
        whole = out.new_zeros(*keep.shape, out.shape[1], out.shape[3])
        whole = whole.index_put((keep,), out[0].transpose(0, 1))
        whole = whole.transpose(1, 2)
        return (whole, state) if return_state else whole

    return function


def _beside(
    module: Any, query: Tensor, key: Tensor, landmarks: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with their rotated part a second time, rotation undone, for the landmarks.

    Queries are 0 there and landmarks 0 in the rotated part, so that near tokens are scored as in
    the original model, and landmarks choose keys by content alone.
    """
    cos, sin = rotation
    width, factor = cos.shape[-1], module.flashmark.rotary
    if key.shape[3] + width > 256:
        raise NotImplementedError(
            "head_dim: expected at most 256 with the rotary part counted twice, "
            f"got {key.shape[3]} + {width}"
        )
    if not getattr(module, "use_rope", True):
        content = key[..., :width]
    else:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        part = key[..., :width] / factor**2
        content = rotate(part, part, cos, -sin)[1]
    key = torch.cat([key, content.to(key.dtype)], dim=-1)
    query = F.pad(query, (0, width))
    still = F.pad(landmarks[..., width:], (width, 0))
    return query, key, torch.cat([still, landmarks[..., :width]], dim=-1)


def _takes_part(mask: object, tokens: int) -> Tensor | None:
    """Key mask of the last tokens, bool (B, N), True where one takes part; None: all of them."""
    if mask is None or (isinstance(mask, TracedMask) and mask.is_causal):
        return None if mask is None or mask.padding is None else mask.padding[:, -tokens:]
    if not isinstance(mask, LazyMask) or mask.pattern is None or not is_plain_causal(mask.pattern):
        got = mask.pattern if isinstance(mask, LazyMask) else type(mask).__name__
        raise NotImplementedError(
            "attention_mask: expected causality and 2-d padding with landmark attention (under "
            f"torch.compile, a 2-d mask of the tokens), got {got}"
        )
    return mask.kept(tokens)
