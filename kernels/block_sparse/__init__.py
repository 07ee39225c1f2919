"""Block-sparse attention in Triton: forward, backward and decode; kernels, launchers, configs."""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
