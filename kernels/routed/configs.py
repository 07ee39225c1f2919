"""Tile sizes, warps and stages of each kernel, from offline compilation for compute capability 9.0.

Gathering takes registers for pointers and waits for memory: tiles are smaller than those of
block-sparse attention, and more programs share a multiprocessor. tests/compile holds the choices to
no spills, or to those on record.
"""

from __future__ import annotations

import torch

from ..block_sparse import configs as shared
from ..block_sparse.configs import Config

# the pass of block-sparse attention that holds and walks such tiles, by pass
PASSES = {
    "forward": "forward",
    "queries": "backward_q",
    "keys": "backward_grouped",
    "decode": "decode",
}
# half precision, by width of the head
_HALF = {
    "forward": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    "queries": {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 32, 8, 2)},
    "keys": {64: Config(64, 64, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 32, 4, 2)},
    "decode": {64: Config(16, 64, 4, 3), 128: Config(16, 64, 4, 2), 256: Config(16, 32, 4, 2)},
}


def choose(
    arch: int | str, dtype: torch.dtype, head_dim: int, pass_: str, exact: bool = True
) -> Config:
    """The config for one of `PASSES`; arguments as in `choose` of block-sparse attention."""
    if arch == "cpu" or dtype == torch.float32:
        return shared.choose(arch, dtype, head_dim, None, PASSES[pass_], True, exact)
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return shared.fit(_HALF[pass_][width], arch, width, dtype)
