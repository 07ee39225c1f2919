"""Triton kernels of Nyström attention, their launchers and configs.

`forward` and `backward` are the triton backend of `flashmark.nystrom.operator`.
"""

from .interface import backward, forward

__all__ = ["backward", "forward"]
