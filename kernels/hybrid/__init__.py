"""Triton kernels of hybrid attention: the slots' sums, chunk by chunk, how queries read the far
field of merge="mass", running totals, and decoding, one token a sample.

The interface, but for decoding, is that of `flashmark.hybrid.eager`. The attention to near keys and
slots is that of the block-sparse kernels.
"""

from .backward import backward as sums_backward
from .forward import forward as sums_forward
from .mass import backward as mass_backward
from .mass import forward as mass_forward
from .scans import running_states, running_states_backward, running_sums
from .step import step

__all__ = [
    "mass_backward",
    "mass_forward",
    "running_states",
    "running_states_backward",
    "running_sums",
    "step",
    "sums_backward",
    "sums_forward",
]
