"""Training of the examples: one model a step at a time, or several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.progress import progress_bar
from flashmark import landmark_parameter_groups
from flashmark.objectives import token_loss


class Training:
    """AdamW on one model. The caller brings batch and rate, so that several models share them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batch: Tensor, rate: float) -> float:
        """One update with learning rate `rate`; returns the loss before it, in bits per byte."""
        self.optimizer.param_groups[0]["lr"] = rate
        loss = bits_per_byte(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def learning_rate(step: int, progress: float, peak: float = 2e-3) -> float:
    """Warmed up over 20 steps, then half a cosine over `progress` from 0 to 1, down to a tenth."""
    return peak * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * progress))


def bits_per_byte(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cost of a byte given those before it. `batch` (B, N + 1)."""
    return token_loss(model(batch[:, :-1]), batch[:, 1:]) / math.log(2)


def train(
    models: dict[str, nn.Module],
    loss: Callable[[str, nn.Module, int], Tensor],
    steps: int,
    *,
    peak: float = 3e-3,
) -> dict[str, list[float]]:
    """`loss(name, model, step)` in nats is minimised for each model; returns them, a step each."""
    optimizers = {
        name: torch.optim.AdamW(
            landmark_parameter_groups(model, 0.01), betas=(0.9, 0.95), fused=True
        )
        for name, model in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    with progress_bar(steps, f"training {len(models)} model(s)") as bar:
        for step in range(steps):
            for name, model in models.items():
                value = loss(name, model.train(), step)
                optimizers[name].zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizers[name].param_groups:
                    group["lr"] = learning_rate(step, step / steps, peak)
                optimizers[name].step()
                losses[name].append(value.item())
            bar.set_postfix_str(" ".join(f"{x[-1]:.2f}" for x in losses.values()), refresh=False)
            bar.update()
    for model in models.values():
        model.eval()
    return losses
