"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles p / theta^(2 i / dim), i = 0 .. dim / 2 - 1.

    Args:
        positions: (B | 1, N), any integer dtype.
        dim: how many dimensions of a head are rotated, even.
        theta: base of the wavelengths, 2 pi to 2 pi theta tokens.

    Returns:
        (cos, sin), each (B | 1, 1, N, dim / 2) float32: in a lower precision, far positions would
        share an angle.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first `dim` dimensions of each head, those after them stay as they are.

    Dimension i is paired with i + dim / 2 (the layout of GPT-NeoX and Llama). The product of a
    rotated query and a rotated key depends on the distance of their positions only.

    Args:
        x: (B, H, N, D), D >= dim.
        angles: from `rotary_angles`.

    Source: Su et al., "RoFormer" (2021).
    """
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([part.to(x.dtype) for part in turned] + [rest], dim=-1)
