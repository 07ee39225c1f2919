"""Registered operators: schema, fake implementations, explicit backward operators, FLOP formulas.

Importing this package registers `torch.ops.flashmark.*`. They have no autograd of their own: the
`torch.autograd.Function` of the public functions is outside. Calling them directly is not
differentiable.
"""

from flashmark.ops import block_sparse, hybrid, nystrom

__all__ = ["block_sparse", "hybrid", "nystrom"]
