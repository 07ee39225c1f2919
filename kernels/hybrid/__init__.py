"""Triton kernels of hybrid attention: what its slots hold, chunk by chunk.

`forward` and `backward` have the interface of `flashmark.hybrid.eager`. The attention to near keys
and slots is that of the block-sparse kernels.
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
