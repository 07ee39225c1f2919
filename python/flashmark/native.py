"""The stable-ABI operators in C++ (and CUDA): tile compaction and the landmark core.

One library lies next to this file where the package was built with a compiler. It reads torch
through its stable ABI only, so one build runs with torch 2.11 and later. Everything here has a twin
in plain PyTorch that is used where the library is missing. On a GPU flashmark itself calls those of
the landmark core alone; the others run when they are called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flashmark import native_fakes
from flashmark.tracing import constant_when_traced

MOST_LANDMARKS = 256  # what the core's kernels take

_LIBRARY = "_native.so"


@functools.cache
def _load() -> str:
    """Load the library; "" or the reason why there is none."""
    path = Path(__file__).with_name(_LIBRARY)
    if not path.exists():
        return "the native operators were not built with this package"
    try:
        torch.ops.load_library(str(path))
        native_fakes.register()
    except (OSError, RuntimeError) as error:  # of another torch, or of other sources
        return f"the native operators could not be loaded: {error}"
    return ""


def available() -> bool:
    """Whether the operators can run on CPU tensors with this torch."""
    return not why_not()


@constant_when_traced
def why_not() -> str:
    """One sentence on why the operators cannot run; empty where they can."""
    return _load()


def has_cuda() -> bool:
    """Whether the library holds the CUDA versions as well."""
    return available() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "flashmark_native::tile_lists", "CUDA"
    )


def preferred(device: torch.device) -> bool:
    """Whether flashmark itself takes the operators for tensors on `device`."""
    return device.type == "cpu" and available()


def solves_cores(device: torch.device) -> bool:
    """Whether flashmark itself takes `tied_core` and `tikhonov_core` for tensors on `device`."""
    return preferred(device) or device.type == "cuda" and has_cuda()


def _operators():
    reason = why_not()
    if reason:
        raise NotImplementedError(f"flashmark.native cannot run: {reason}")
    return torch.ops.flashmark_native


def pack_tiles(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Bits and counts of tiles.

    Args:
        elements: bool (n, block_q, block_kv).

    Returns:
        bits: int32 (n, block_q, ceil(block_kv / 32)), element `32 * w + k` in bit k of word w.
        counts: int64 (n,), how many elements of a tile are True.
    """
    _check_bool("elements", elements, 3)
    return _operators().pack_tiles(elements)


def pack_dense(visible: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor]:
    """`pack_tiles` of all tiles of a dense mask, in order (batch, head, query, key block).

    Args:
        visible: bool (B, H, q_len, kv_len), any strides. What a tile holds beyond its edges
            counts as False.
        block_q, block_kv: sizes of a tile, > 0.
    """
    _check_bool("visible", visible, 4)
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {size}")
    return _operators().pack_dense(visible, block_q, block_kv)


def distinct_tiles(
    bits: Tensor, counts: Tensor, area: int, *, max_tiles: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number the tiles that are neither empty nor full, equal bits once.

    Args:
        bits, counts: what `pack_tiles` returned.
        area: elements of a whole tile: one with as many is FULL.
        max_tiles: rows of the results; None is as many as there are, which a GPU cannot know
            without a wait.

    Returns:
        classes: int32 (n,): -2 EMPTY, -1 FULL, else the row of tile_bits.
        tile_bits: int32 (U, block_q, words), the distinct tiles. On a CPU in the order of
            `torch.unique(dim=0)`, on a GPU in the order of their first appearance. Rows that are
            not taken are 0.
        visible: int64 (U,), elements of each row.
        found: int64 (1,), how many rows are taken. More than max_tiles: an error on a CPU; on a GPU
            the classes of tiles that did not fit point behind tile_bits, and asking `found` is the
            caller's.
    """
    if bits.dtype is not torch.int32 or bits.dim() != 3:
        raise TypeError(f"bits: expected int32 (n, block_q, words), got {_describe(bits)}")
    if counts.dtype is not torch.int64 or counts.shape != bits.shape[:1]:
        raise TypeError(f"counts: expected int64 ({bits.shape[0]},), got {_describe(counts)}")
    if max_tiles is None and bits.device.type != "cpu":
        raise ValueError("max_tiles: expected an int for tensors on a GPU, got None")
    limit = -1 if max_tiles is None else max_tiles
    classes, tile_bits, visible, found = _operators().distinct_tiles(bits, counts, area, limit)
    if max_tiles is not None and found.device.type == "cpu" and int(found) > max_tiles:
        raise ValueError(
            f"max_tiles: expected at most {max_tiles} distinct tiles, got {int(found)}"
        )
    return classes, tile_bits, visible, found


def tile_lists(
    visible: Tensor, classes: Tensor, area: Tensor, *, capacity: int | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The lists that kernels read, from a grid of tiles.

    Args:
        visible: bool (B, H, q_blocks, kv_blocks), any strides: which tiles are there at all.
        classes: int32 of the same shape, any strides: -2 EMPTY, -1 FULL, else a row of tile_bits.
        area: int64 (U + 2,): visible elements of an EMPTY tile, a FULL one and of each row of
            tile_bits.
        capacity: entries of runs and of partials, 0 behind the last; None is as many as there are,
            which a GPU cannot know without a wait. Entries beyond it are left out.

    Returns:
        rows, cols: six tensors each, in the order of `TileLists`.
        kept: int64 (), visible elements.
        taken: int64 (), tiles that are not EMPTY.
    """
    _check_bool("visible", visible, 4)
    if classes.dtype is not torch.int32 or classes.shape != visible.shape:
        raise TypeError(f"classes: expected int32 {tuple(visible.shape)}, got {_describe(classes)}")
    if area.dtype is not torch.int64 or area.dim() != 1:
        raise TypeError(f"area: expected int64 (U + 2,), got {_describe(area)}")
    if capacity is None and visible.device.type != "cpu":
        raise ValueError("capacity: expected an int for tensors on a GPU, got None")
    limit = -1 if capacity is None else capacity
    lists = _operators().tile_lists(visible, classes, area, limit)
    return lists[:6], lists[6:12], lists[12], lists[13]


def tied_core(
    scores: Tensor,
    jitter: float,
    softmax: bool = True,
    *,
    wide: bool = True,
    again: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The core of tied landmarks: `landmark_core(method="cholesky")` from the scores on.

    With U = D^-1/2 exp(scores) D^-1/2, D the diagonal of exp(scores), and P = (U + jitter)^-1: P
    itself, or with softmax D^-1/2 P D^-1/2 times a diagonal that makes its rows sum to 1. One
    factorisation a head; the gradient is one more launch, by -P dP P.

    Args:
        scores: (..., M, M) symmetric, float32 or float64; the lower triangle is read.
        jitter: >= 0, added to U's diagonal of 1. A head whose factorisation fails all the same,
            because rounding of the scores made it indefinite, takes 10 times as much, and again:
            the result is finite for finite scores. With 0 a singular core is an error on a CPU, not
            finite on a GPU.
        wide: float64 inside for float32 scores.
        again: the same in plain PyTorch: what a second derivative goes through. None: there is no
            second derivative.

    Returns:
        (..., M, M) in the dtype of the scores. Scores that are not finite give NaN.
    """
    _check_square("scores", scores, jitter)
    if not _recording(scores):
        return _solve(_operators().tied_core.default, scores, float(jitter), softmax, wide)[0]
    return _TiedCore.apply(scores, float(jitter), softmax, wide, again)


def tikhonov_core(
    matrix: Tensor,
    jitter: float,
    unit_rows: bool = True,
    *,
    wide: bool = True,
    again: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The core of any square A, `landmark_core(method="tikhonov")`: (A^T A + jitter)^-1 A^T.

    Args:
        matrix: A, (..., M, M), float32 or float64.
        jitter: >= 0; more is taken as in `tied_core` where the factorisation fails.
        unit_rows: what a row's sum lacks to 1 is spread over the row.
        wide, again: as in `tied_core`.

    Returns:
        (..., M, M) in the dtype of the matrix.
    """
    _check_square("matrix", matrix, jitter)
    if not _recording(matrix):
        return _solve(_operators().tikhonov_core.default, matrix, float(jitter), unit_rows, wide)[0]
    return _TikhonovCore.apply(matrix, float(jitter), unit_rows, wide, again)


def landmarks_core(
    landmarks: Tensor,
    scale: float,
    jitter: float,
    softmax: bool,
    *,
    again: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`tied_core` of the scores `scale X X^T` of landmarks X: one operator, one for the gradient.

    Args:
        landmarks: X, (..., M, D), float32 or float64; sums are float64.
        scale: > 0.
        jitter: > 0 on a CPU, >= 0 on a GPU, as in `tied_core`.
        softmax, again: as in `tied_core`.

    Returns:
        (..., M, M) in the dtype of the landmarks.
    """
    if not _recording(landmarks):
        return _operators().landmarks_core.default(landmarks, scale, jitter, softmax)
    return _LandmarksCore.apply(landmarks, scale, jitter, softmax, again)


class _TiedCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, jitter, softmax, wide, again):
        core, *solved = _solve(_operators().tied_core.default, scores, jitter, softmax, wide)
        ctx.save_for_backward(scores, *solved)
        ctx.softmax, ctx.again = softmax, again
        return core

    @staticmethod
    def backward(ctx, dcore):
        scores, inverse, used = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(ctx.again, scores, dcore), None, None, None, None
        dscores = _operators().tied_core_backward(
            _heads(scores), inverse, used, _heads(dcore), ctx.softmax
        )
        return dscores.view(scores.shape), None, None, None, None


class _LandmarksCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, landmarks, scale, jitter, softmax, again):
        core, *solved = _operators().landmarks_core_saving(landmarks, scale, jitter, softmax)
        ctx.save_for_backward(landmarks, *solved)
        ctx.scale, ctx.softmax, ctx.again = scale, softmax, again
        return core

    @staticmethod
    def backward(ctx, dcore):
        landmarks, inverse, used = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(ctx.again, landmarks, dcore), None, None, None, None
        dlandmarks = _operators().landmarks_core_backward(
            landmarks, inverse, used, dcore, ctx.scale, ctx.softmax
        )
        return dlandmarks, None, None, None, None


class _TikhonovCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, jitter, unit_rows, wide, again):
        core, inverse, _ = _solve(
            _operators().tikhonov_core.default, matrix, jitter, unit_rows, wide
        )
        ctx.save_for_backward(matrix, inverse)
        ctx.unit_rows, ctx.again = unit_rows, again
        return core

    @staticmethod
    def backward(ctx, dcore):
        matrix, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(ctx.again, matrix, dcore), None, None, None, None
        dmatrix = _operators().tikhonov_core_backward(
            _heads(matrix), inverse, _heads(dcore), ctx.unit_rows
        )
        return dmatrix.view(matrix.shape), None, None, None, None


def _solve(
    operator: Callable, matrix: Tensor, jitter: float, flag: bool, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    core, inverse, used = operator(_heads(matrix), jitter, flag, wide)
    if jitter == 0 and readable(matrix):
        check_definite(used == 0)
    return core if matrix.dim() == 3 else core.view(matrix.shape), inverse, used


def readable(x: Tensor) -> bool:
    """Whether values may be read without waiting for a GPU or breaking a graph or a transform."""
    transformed = torch._C._are_functorch_transforms_active
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def check_definite(definite: Tensor) -> None:
    """Raise where jitter = 0 and a head's core is singular."""
    if not bool(definite.all()):
        raise ValueError(
            "jitter: expected a number > 0 for landmarks whose core is singular or not finite, "
            "got 0"
        )


def _differentiable(
    again: Callable[[Tensor], Tensor] | None, x: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient with a graph of its own, for create_graph=True."""
    if again is None:
        raise NotImplementedError("again: expected a function for a second derivative, got None")
    return torch.autograd.grad(again(x), x, gradient, create_graph=True)[0]


def _recording(x: Tensor) -> bool:
    """Whether autograd follows a function of x."""
    return torch.is_grad_enabled() and x.requires_grad


def _heads(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def _check_square(name: str, x: Tensor, jitter: float) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] != x.shape[-2] or not 1 <= x.shape[-1] <= MOST_LANDMARKS:
        raise ValueError(f"{name}: expected (..., M, M) with M from 1 to 256, got {tuple(x.shape)}")
    if not jitter >= 0:
        raise ValueError(f"jitter: expected a number >= 0, got {jitter}")


def _check_bool(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dtype is not torch.bool or tensor.dim() != dims:
        raise TypeError(
            f"{name}: expected a bool tensor of {dims} dimensions, got {_describe(tensor)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
