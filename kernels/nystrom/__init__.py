"""Triton kernels of Nyström attention, their launchers and configs.

`forward`, `backward` and `update` are the triton backend of `flashmark.nystrom.operator`.
"""

from .interface import backward, forward, update

__all__ = ["backward", "forward", "update"]
