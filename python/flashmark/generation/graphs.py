"""A decoding step on memory of its own, so that a CUDA graph can replay it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashmark.generation.choice import Choice
from flashmark.generation.prompts import CachedModel, Ends


class Step:
    """One more token of each sample; `token` and `finished` are updated in place.

    Attributes:
        token: (B,), the newest.
        finished: bool (B,), samples that have produced an end token.
        masked: whether finished samples are kept out of the model's cache.
    """

    def __init__(self, model: CachedModel, cache, choose: Choice, ends: Ends, prompts: Tensor):
        self.model, self.cache, self.choose, self.ends = model, cache, choose, ends
        self.token = prompts.new_zeros(prompts.shape[0])
        self.finished = torch.zeros_like(self.token, dtype=torch.bool)
        self.masked = False

    def take(self, logits: Tensor) -> None:
        """Choose the next token from logits (B, V)."""
        token = self.choose(logits).to(self.token.dtype)
        if self.ends:
            token = token.masked_fill(self.finished, self.ends.filler)
            self.finished.logical_or_(self.ends.reached(token))
        self.token.copy_(token)

    def __call__(self) -> None:
        taking_part = ~self.finished[:, None] if self.masked else None
        self.take(self.model(self.token[:, None], key_mask=taking_part, cache=self.cache)[:, -1])


def check_graph(device: torch.device, cache) -> None:
    """Raise where a step cannot be captured."""
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(
            f"cuda_graph: expected prompts on an NVIDIA GPU with cuda_graph=True, got {device}"
        )
    if getattr(cache, "rollback", 0):
        raise ValueError(
            "cache: expected one made without rollback with cuda_graph=True, "
            f"got rollback={cache.rollback}"
        )


def capture(step: Step, generator: torch.Generator | None) -> Callable[[], None]:
    """`step` as a CUDA graph. Capturing it computes nothing."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay
