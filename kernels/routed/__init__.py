"""Attention over chosen blocks in Triton: forward, backward and decode; kernels and launchers.

The near field of a query, its own block and those just before, lies beside that of its neighbours:
a program holds a tile of queries. The chosen blocks differ from query to query: a program holds
queries, gathered from anywhere, that chose the same block, and writes what they find there, which
the program of the near field merges by lse.
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
