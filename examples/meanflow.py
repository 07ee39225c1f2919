"""One step towards a generator that needs one step: MeanFlow (Geng et al., 2025) on toy sequences.

The network u(z, r, t) predicts the mean velocity of a flow between the times r and t. Its target is
v - (t - r) du/dt, a derivative along (dz, dr, dt) = (v, 0, 1): forward mode through the attention.

    python examples/meanflow.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import flashmark
from flashmark.masks import sliding_window

TOKENS, WIDTH, HEADS = 48, 32, 4
NEAR = sliding_window(12, 12)


class Network(nn.Module):
    """u(z, r, t) for sequences of numbers, z (B, N): two layers of windowed attention."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.enter = nn.Linear(1, WIDTH)
        self.times = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.place = nn.Parameter(0.5 * torch.randn(TOKENS, WIDTH))
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.join = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.leave = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        x = self.enter(z.unsqueeze(-1)) + self.place
        x = x + self.times(torch.stack([t, t - r], -1)).unsqueeze(1)
        for project, join in zip(self.project, self.join, strict=True):
            parts = project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            out = flashmark.block_sparse_attention(*parts, NEAR)
            x = x + join(out.transpose(1, 2).flatten(2))
        return self.leave(x).squeeze(-1)


def waves(batch: int) -> Tensor:
    """Data: sine waves of one period, with any phase."""
    phase = 2 * math.pi * torch.rand(batch, 1)
    return torch.sin(torch.linspace(0, 2 * math.pi, TOKENS) + phase)


def loss_of(network: nn.Module, data: Tensor) -> Tensor:
    """The loss of one training step."""
    noise = torch.randn_like(data)
    t, r = torch.rand(2, len(data)).sort(0, descending=True).values
    r = torch.where(torch.rand(len(data)) < 0.5, t, r)  # half of them plain flow matching
    z = torch.lerp(data, noise, t.unsqueeze(1))
    velocity = noise - data
    given, along = (z, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t))
    mean, derivative = torch.func.jvp(network, given, along)
    target = velocity - (t - r).unsqueeze(1) * derivative.detach()
    error = (mean - target).square().mean(1)
    return (error / (error.detach() + 1e-2)).mean()  # the paper's adaptive weight, power 1


def train(steps: int = 200, batch: int = 32) -> tuple[Network, list[float]]:
    """The trained network, and the error of u against its target at each step."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(network, waves(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network, losses


@torch.no_grad()
def generate(network: nn.Module, batch: int) -> Tensor:
    """Sequences in one step: z - u(z, 0, 1) from noise z."""
    noise = torch.randn(batch, TOKENS)
    return noise - network(noise, torch.zeros(batch), torch.ones(batch))


if __name__ == "__main__":
    network, _ = train()
    made = generate(network, 64)
    steps = made.diff(dim=1).abs().mean()
    print(
        f"mean step between neighbours: made {steps:.3f}, data {waves(64).diff().abs().mean():.3f}"
    )
