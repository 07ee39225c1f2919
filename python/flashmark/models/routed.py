"""Routed attention in the place of exact attention, and what its landmarks learn from."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from flashmark.models.decoder import Decoder
from flashmark.nn import RoutedAttention
from flashmark.objectives import routing_loss


def to_routed(
    model: Decoder,
    *,
    landmarks: int | None = None,
    block_size: int = 64,
    top_k: int = 16,
    near: int = 1,
) -> Decoder:
    """A copy of a decoder whose layers of exact attention choose the key blocks that they read.

    No weight changes, so that with a `top_k` of all blocks the copy computes what the model does.

    Args:
        model: with layers of exact causal attention; those of other kinds stay as they are.
        landmarks: how many a key head has; they start untrained. None: a block is known by its mean
            key, and the copy has no weights of its own.
        block_size, top_k, near: as in `flashmark.nn.RoutedAttention`.

    Raises:
        TypeError, ValueError: not a Decoder, or one without such a layer.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model: expected a Decoder, got {type(model).__name__}")
    kinds = model.config.attentions()
    if "exact" not in kinds or model.config.mask is not None:
        raise ValueError(
            "model: expected layers of exact causal attention, got "
            f"attention={model.config.attention!r}, mask={model.config.mask!r}"
        )
    config = dataclasses.replace(
        model.config,
        attention=tuple("routed" if kind == "exact" else kind for kind in kinds),
        block_landmarks=landmarks, block_size=block_size, top_k=top_k, near=near,
    )  # fmt: skip
    weight = model.embed.weight
    found = Decoder(config).to(weight.device, weight.dtype).train(model.training)
    found.load_state_dict(model.state_dict(), strict=False)
    found.recompute = model.recompute
    return found


def record_routing(model: nn.Module, record: bool = True) -> None:
    """Have every `RoutedAttention` in a model keep the routing of its calls, or no longer."""
    for module in model.modules():
        if isinstance(module, RoutedAttention):
            module.record_routing = record
            module.routing = None


def routing_losses(model: nn.Module) -> Tensor:
    """Sum of `routing_loss` over the layers that recorded the newest call; add it to the loss.

    Without one it is 0, on the CPU.
    """
    found = [x.routing for x in model.modules() if isinstance(x, RoutedAttention)]
    losses = [routing_loss(routing) for routing in found if routing is not None]
    return torch.stack(losses).sum() if losses else torch.zeros(())
