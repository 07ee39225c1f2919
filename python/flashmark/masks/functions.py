"""Masks that are a function of the indices, as FlexAttention's `mask_mod`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashmark.masks.data import every_tile
from flashmark.masks.expression import PARTIAL, Mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


class _MaskMod(Mask):
    closed_form = False

    def __init__(self, fn: MaskMod, device: torch.device | None = None):
        self.fn, self.device = fn, device

    def dims(self, batch, heads):
        return tuple(
            size if size > 1 and self._reads(axis) else 1
            for axis, size in enumerate((batch, heads))
        )

    def _reads(self, axis: int) -> bool:
        """Whether the result depends on this index, found by vmap over it alone."""
        found = []

        def fn(*indices):
            out = self._called(*indices)
            found.append(torch._C._functorch.is_batchedtensor(out))
            return out

        index = torch.zeros(4, 1, dtype=torch.long, device=self.device)
        dims = [0 if x == axis else None for x in range(4)]
        given = [index[x] if x == axis else index[x, 0] for x in range(4)]
        torch.vmap(fn, tuple(dims))(*given)
        return found[0]

    def tiles(self, grid, b, h, q_block, kv_block):
        shape = torch.broadcast_shapes(b.shape, h.shape, q_block.shape, kv_block.shape)
        return torch.full(shape, PARTIAL, dtype=torch.uint8, device=grid.device)

    def key(self, grid, b, h, q_block, kv_block):
        return every_tile(self, grid, b, h, q_block, kv_block)

    def elements(self, grid, b, h, i, j):
        """Evaluate under vmap over each dimension, mapping the indices that vary along it."""
        indices = (b, h, i, j)
        shape = torch.broadcast_shapes(*(x.shape for x in indices))
        if 0 in shape:
            return b.new_empty(shape, dtype=torch.bool)
        fn: Callable[..., Tensor] = self._called
        for axis in reversed(range(len(shape))):
            fn = torch.vmap(fn, tuple(0 if x.shape[axis] == shape[axis] else None for x in indices))
        constant = [[a for a, n in enumerate(x.shape) if n != shape[a]] for x in indices]
        return fn(*(x.squeeze(axes) for x, axes in zip(indices, constant, strict=True)))

    def _called(self, *indices: Tensor) -> Tensor:
        with _ScalarIndices():
            out = self.fn(*indices)
        if not isinstance(out, Tensor) or out.dtype is not torch.bool:
            got = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"fn: expected a function that returns a bool tensor, got {got}")
        if out.dim():
            raise ValueError(
                f"fn: expected one bool for one (b, h, q, kv), got shape {tuple(out.shape)}"
            )
        return out

    def to(self, device, *, non_blocking=False):
        return _MaskMod(self.fn, torch.device(device))

    def __repr__(self):
        return f"mask_mod({getattr(self.fn, '__name__', self.fn)})"


class _ScalarIndices(TorchFunctionMode):
    """Makes x[i] look up a scalar tensor i on the device; PyTorch would read i as a number, which
    has none under vmap."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return _looked_up(*args)
        return func(*args, **(kwargs or {}))


def _looked_up(x: Tensor, index: Any) -> Tensor:
    """x[index], scalars among the integer tensors taken as the integers they are."""
    index = index if isinstance(index, tuple) else (index,)
    if not any(map(_is_scalar, index)) or not all(map(_takes_one_dimension, index)):
        return x[index]
    rest = x.dim() - sum(n is not None and n is not ... for n in index)
    whole = (slice(None),)
    if ... in [n for n in index if not isinstance(n, Tensor)]:
        at = next(k for k, n in enumerate(index) if n is ...)
        index = index[:at] + whole * rest + index[at + 1 :]
    x = x[tuple(whole[0] if isinstance(n, Tensor) else n for n in index)]
    kept = [n for n in index if not isinstance(n, int)]
    x = torch.ops.aten.index(x, [n.long() if _is_scalar(n) else None for n in kept])
    lists = [n if isinstance(n, Tensor) else whole[0] for n in kept if not _is_scalar(n)]
    return x[tuple(lists)] if any(isinstance(n, Tensor) for n in lists) else x


def _is_scalar(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype in _INTEGERS


def _takes_one_dimension(index: Any) -> bool:
    """Whether an index entry takes at most one dimension; None and ... take none."""
    if isinstance(index, Tensor):
        return index.dtype in _INTEGERS
    return index is None or index is ... or isinstance(index, slice) or type(index) is int


def mask_mod(fn: MaskMod) -> Mask:
    """FlexAttention's `mask_mod`: fn(b, h, q, kv) -> bool, of raw indices (no alignment).

    `fn` takes scalar integer tensors and returns a scalar bool tensor; it may read tensors at them,
    reduce (`(tags[q] & tags[kv]).any()`), and call whatever `torch.vmap` can. Evaluated over a band
    of tiles at a time, at each call that is given the expression: what it reads may change. Tensors
    that `fn` closes over must be on the device it is compiled for.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a callable (b, h, q, kv) -> bool, got {type(fn).__name__}")
    return _MaskMod(fn)
