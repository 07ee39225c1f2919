"""Triton kernels of Nyström attention, their launchers and configs.

`forward` and `backward` have the interface of `flashmark.eager.nystrom`.
"""

from .interface import backward, forward

__all__ = ["backward", "forward"]
