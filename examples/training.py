"""The training loop of the examples: several models side by side, a progress bar over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.decoder import learning_rate
from flashmark import landmark_parameter_groups


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
    with tqdm(total=steps, unit="step", desc=f"training {len(models)} model(s)") as bar:
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
