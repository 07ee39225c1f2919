"""Block-sparse attention in Triton: forward, backward, forward mode and decode; kernels, launchers, configs."""

from .backward import backward
from .forward import forward
from .jvp import jvp

__all__ = ["backward", "forward", "jvp"]
