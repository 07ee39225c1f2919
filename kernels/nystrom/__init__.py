"""Triton kernels of Nyström attention, their launchers and configs.

`forward` and `backward` have the interface of `flashmark.nystrom.eager.interface`.
"""

from .interface import backward, forward

__all__ = ["backward", "forward"]
