"""Calls that between them run every CUDA C++ kernel: lists of integers are exact, errors of the
landmark core stand beside PyTorch's.
"""

from __future__ import annotations

import torch

from flashmark import native
from flashmark.nystrom import landmark_core
from tests.helpers import relative_error

from . import cuda

Errors = tuple[float, float]


def _bits(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def _normal(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def tile_lists() -> Errors:
    """The lists of a drawn mask: packed, its distinct tiles found, its tiles listed."""
    visible = _bits(1, 2, 64, 96, seed=0)
    visible[..., :16, :32] = True
    bits, counts = cuda.pack_dense(visible, 16, 32)
    wanted = native.pack_dense(visible, 16, 32)
    same = [torch.equal(x, y) for x, y in zip((bits, counts), wanted, strict=True)]
    area, shape = 16 * 32, (1, 2, 4, 3)
    classes, _, seen, _ = cuda.distinct_tiles(bits, counts, area, len(bits))
    expected, _, exact, _ = native.distinct_tiles(bits, counts, area)
    chosen = expected >= 0
    same.append(torch.equal(classes[~chosen], expected[~chosen]))
    same.append(torch.equal(seen[classes[chosen].long()], exact[expected[chosen].long()]))
    some, classes = _bits(*shape, seed=1), classes.view(shape)
    got = cuda.tile_lists(some, classes, seen, some.numel())
    wanted = native.tile_lists(some, classes, seen, capacity=some.numel())
    for mine, theirs in zip(got[:2], wanted[:2], strict=True):
        same += [torch.equal(x, y) for x, y in zip(mine, theirs, strict=True)]
    return 1.0 - sum(same) / len(same), 0.0


def core_of_landmarks() -> Errors:
    """The core of tied landmarks, float64 inside, and its gradient."""
    X, dcore = _normal(2, 17, 16, seed=2).float(), _normal(2, 17, 17, seed=3).float()
    scale, jitter, flag = 0.25, 1e-3, True

    def plain(X: torch.Tensor) -> list[torch.Tensor]:
        X = X.requires_grad_()
        core = landmark_core._tied_core(scale * X @ X.mT, jitter, flag)
        return [core.detach(), *torch.autograd.grad(core, X, dcore.to(X.dtype))]

    kernels = cuda.Core(torch.float32, torch.float64, True)
    core, inverse, used = kernels.from_landmarks(X, scale, jitter, flag, saving=True)
    dX = kernels.landmarks_backward(X, inverse, used, dcore, scale, flag)
    return _worst([core, dX], plain(X.double()), plain(X.clone()))


def core_of_scores() -> Errors:
    """The core of tied scores, which are symmetric, and of a given matrix; their gradients."""
    marks, dcore = _normal(2, 17, 16, seed=4), _normal(2, 17, 17, seed=5)
    scores, matrix = marks @ marks.mT / 4, torch.softmax(_normal(2, 17, 17, seed=6), -1)
    jitter, flag, kernels = 1e-3, True, cuda.Core(torch.float32, torch.float64, True)
    scores, matrix, dcore = scores.float(), matrix.float(), dcore.float()
    core, inverse, used = kernels.forward("tied", scores, jitter, flag)
    got = [core, _symmetric(kernels.tied_backward(scores, inverse, used, dcore, flag))]
    core, inverse, _ = kernels.forward("tikhonov", matrix, jitter, flag)
    got += [core, kernels.tikhonov_backward(matrix, inverse, dcore, flag)]

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        found = []
        for x, f in ((scores, landmark_core._tied_core), (matrix, landmark_core._tikhonov_core)):
            x = x.to(dtype, copy=True).requires_grad_()
            core = f(x, jitter, flag)
            found += [core.detach(), *torch.autograd.grad(core, x, dcore.to(dtype))]
        found[1] = _symmetric(found[1])
        return found

    return _worst(got, plain(torch.float64), plain(torch.float32))


def _symmetric(x: torch.Tensor) -> torch.Tensor:
    return x + x.mT


def _worst(got, wanted, plain) -> Errors:
    pairs = zip(got, wanted, plain, strict=True)
    errors = [(relative_error(x, y), relative_error(z, y)) for x, y, z in pairs]
    return max(errors, key=lambda pair: pair[0] / (pair[1] + 1e-7))


CALLS = {
    "lists of tiles": tile_lists,
    "landmark core": core_of_landmarks,
    "core of scores": core_of_scores,
}
