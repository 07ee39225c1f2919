"""Block-sparse attention in Triton: kernels, launchers, configs."""

from .backward import backward
from .forward import forward
from .jvp import jvp

__all__ = ["backward", "forward", "jvp"]
