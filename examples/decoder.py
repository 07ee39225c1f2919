"""A byte-level decoder that trains while you wait. Its attention is whatever it is given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.text import BYTES


class Block(nn.Module):
    """x + attention(x), then x + mlp(x). A convolution over the last 4 bytes tells their order."""

    def __init__(self, width: int, heads: int, attention: nn.Module):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.order = nn.Conv1d(width, width, kernel_size=4, groups=width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, N, width)
        y = self.norms[0](x)
        y = y + self.order(F.pad(y.mT, (3, 0))).mT
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head width)
            for part in self.qkv(y).chunk(3, dim=-1)
        )
        y = self.attention(query, key, value)
        x = x + self.merge(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    """Logits (B, N, 256) for the next byte from bytes (B, N).

    `attention(heads, head_width)` makes a layer's, a module from query, key, value to the output.
    """

    def __init__(
        self,
        attention: Callable[[int, int], nn.Module],
        *,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
    ):
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, attention(heads, width // heads)) for _ in range(layers)
        )
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, BYTES, bias=False))
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.head[1].weight, std=0.01)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Training:
    """AdamW on one model. The caller brings batch and rate, so that several models share them."""

    def __init__(self, model: Decoder):
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


def bits_per_byte(model: Decoder, batch: Tensor) -> Tensor:
    """Mean cost of a byte given those before it. `batch` (B, N + 1)."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)
