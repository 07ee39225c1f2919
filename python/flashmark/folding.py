"""A mapped dimension folded into the heads or the batch of one call.

The dimensions of every tensor of a call are declared by letters, one each (`Operator.dims`): B is
the batch, H the heads, lower case where the size may be 1 for all, and . is any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from flashmark.masks.block_mask import BlockMask
from flashmark.masks.cache import block_mask_for
from flashmark.masks.expression import Mask


class Fold(NamedTuple):
    """One mapped dimension: where it went, its size, and whether the mask's tensors have it too."""

    axis: str  # "B" or "H"
    size: int
    of_mask: bool


def letters(task, name: str, x: Tensor) -> str | None:
    """The letters of a tensor of a pass; None for one that no fold touches."""
    options = task.operator.dims.get(name.split(" ")[-1], ())
    return next((found for found in options if len(found) == x.dim()), None)


def _place(found: str | None, axis: str) -> int:
    return -1 if found is None else found.upper().find(axis)


def axis_for(task, given: dict[str, Tensor], mapped: dict[str, int | None]) -> str | None:
    """ "B" or "H", or None where a mapped dimension fits neither."""
    return next((axis for axis in "BH" if _fits(task, axis, given, mapped)), None)


def _fits(task, axis: str, given, mapped) -> bool:
    for name, x in given.items():
        if name.startswith(":"):
            continue
        if axis in task.operator.unfoldable.get(name, ""):
            return False
        own = _unmapped(x, mapped[name])
        inside = _place(letters(task, name, own), axis) >= 0
        per_sample = task.kind == "backward" and name in task.operator.wanted
        if not inside and own.numel() and (mapped[name] is not None or per_sample):
            return False
    if axis == "B" or task.mask is None:
        return True
    # heads of a mask go with its batch only where that is 1
    mask = task.mask
    if isinstance(mask, BlockMask):
        return mask.heads == 1 or (mask.batch == 1 and not task.folds)
    return False


def _unmapped(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.select(dim, 0)


def select(x: Tensor, dim: int | None, n: int) -> Tensor:
    return x if dim is None else x.select(dim, n)


def fold(task, axis: str, count: int, given, mapped) -> list[Tensor]:
    """The tensors of the folded pass."""
    sizes = _sizes(task, given, mapped)
    of_mask = any(n.startswith(":") and d is not None for n, d in mapped.items())
    folded = []
    for name, x in given.items():
        dim = mapped[name]
        if name.startswith(":"):
            if of_mask:
                x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(x)
            continue
        found = letters(task, name, _unmapped(x, dim))
        place = _place(found, axis)
        if found is None or place < 0:
            folded.append(x if dim is None else _unmapped(x, dim))
            continue
        x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        if found[place].islower() and x.shape[place + 1] == 1:
            shape = list(x.shape)
            shape[place + 1] = sizes[axis]
            x = x.expand(shape)
        folded.append(x.movedim(0, place).flatten(place, place + 1))
    return folded


def _sizes(task, given, mapped) -> dict[str, int]:
    """Batch and query heads of the call before the fold."""
    query = _unmapped(given["query"], mapped["query"])
    return {"B": query.shape[0], "H": query.shape[1]}


def unfold(task, axis: str, count: int, given, outs) -> tuple[tuple[Tensor, ...], tuple]:
    """Results of a folded pass with the mapped dimension in front, and where it is."""
    operator = task.operator
    names = list(operator.outputs)
    if task.kind == "backward":
        names = [n for n in operator.wanted if n in given]
    elif task.kind == "jvp":
        names += list(operator.differentiable)
    opened: list[Tensor] = []
    dims: list[int | None] = []
    for name, x in zip(names, outs, strict=True):
        found = letters(task, name, x)
        place = _place(found, axis)
        if found is None or place < 0:  # empty
            opened.append(x)
            dims.append(None)
            continue
        x = x.unflatten(place, (count, -1))
        if task.kind == "backward" and found[place].islower():
            x = _reduced(x, place + 1, given[name], found)
        opened.append(x.movedim(place, 0))
        dims.append(0)
    return tuple(opened), tuple(dims)


def _reduced(grad: Tensor, place: int, like: Tensor, found: str) -> Tensor:
    """Gradient of a tensor that was spread over a dimension of size 1."""
    own = like.shape[-len(found) :]
    return grad.sum(place, keepdim=True) if own[place - 1] == 1 else grad


def combined(mask: BlockMask | Mask, read: list[Tensor], folds: tuple[Fold, ...], call: Any):
    """The mask of a folded call."""
    with temporarily_clear_interpreter_stack():
        batch, heads, q_len, _ = call.query.shape
        for axis, count, _ in folds:
            batch, heads = (batch // count, heads) if axis == "B" else (batch, heads // count)
        kv_len = call.key.shape[2]
        rows = q_len if getattr(call, "query_offset", None) is None else kv_len
        sizes = batch, heads, rows, kv_len, call.query.device
        return _combined(mask, read, folds, sizes)


def _combined(mask, read, folds, sizes) -> BlockMask:
    if not folds:
        if isinstance(mask, BlockMask):
            return mask
        tensors = iter(read)
        opened = mask.mapped(lambda _: next(tensors))
        return block_mask_for(opened, *sizes)
    *inner, (axis, count, of_mask) = folds
    if of_mask:
        parts = [_combined(mask, [x[n] for x in read], inner, sizes) for n in range(count)]
    else:
        parts = [_combined(mask, read, inner, sizes)] * count
    first = parts[0]
    if not of_mask and (
        first.kind != "sparse" or (first.batch if axis == "B" else first.heads) == 1
    ):
        return first
    if axis == "B":
        if of_mask:
            batch = sizes[0]
            for a, n, _ in inner:
                batch *= n if a == "B" else 1
            parts = [p for x in parts for p in [x] * (batch // x.batch)]
        return BlockMask.cat(parts)
    joined = BlockMask.cat(parts)
    tensors = [
        x.reshape(1, -1, x.shape[-1]) if x.dim() == 3 and n in (4, 5, 10, 11) else x
        for n, x in enumerate(joined.tensors())
    ]
    layout = [*joined.layout[:4], 1, len(parts) * first.heads]
    return BlockMask.from_tensors(tensors, layout, "sparse")
