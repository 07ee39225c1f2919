"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.arguments import check_count, finite


class Choice:
    """The next token of each sample from its logits (B, V): the likeliest, or a random one."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
    ):
        self.temperature = finite("temperature", temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
        if top_k is not None:
            top_k = check_count("top_k", top_k)
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
        self.top_k, self.top_p, self.generator = top_k, top_p, generator

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0.0:
            return logits.argmax(-1)
        return self.draw(self.probabilities(logits))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Token probabilities (..., V), float32 or wider; at temperature 0, 1 for the likeliest."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.temperature == 0.0:
            one = torch.ones(logits.shape[:-1], dtype=wide, device=logits.device)[..., None]
            return torch.zeros_like(logits, dtype=wide).scatter(
                -1, logits.argmax(-1, keepdim=True), one
            )
        ordered, order = (logits.to(wide) / self.temperature).sort(
            stable=True, dim=-1, descending=True
        )
        if self.top_k is not None:
            ordered[..., self.top_k :] = -torch.inf
        shares = ordered.softmax(-1)
        if self.top_p is not None:
            before = shares.cumsum(-1) - shares  # of all that are likelier
            shares = shares.masked_fill(before >= self.top_p, 0.0)
            shares = shares / shares.sum(-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, order, shares)

    def draw(self, probabilities: Tensor) -> Tensor:
        """A token of each row of (B, V); rows need not sum to 1."""
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, device=like.device)
