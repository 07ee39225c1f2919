"""Suite `native`: tile compaction and the landmark core in C++ and CUDA, against plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashmark
from bench.compare import Job, Prepare, Row, Settings, compare
from bench.patterns import Formula
from bench.peers import Unavailable
from flashmark import masks
from flashmark import native as operators

BLOCK = 128
CORE = (144, 64, 64)  # heads of a whole decoder, landmarks, dimensions


def native(settings: Settings) -> Iterator[Job]:
    """Compiling masks that depend on data, and the core with its gradient."""
    for n in settings.choose_lengths(cpu=(16384,), gpu=(16384,)):
        for name, case in CASES.items():
            if settings.patterns and name not in settings.patterns:
                continue
            leading, mask, formula = case(n, settings.device)
            yield _mask_job(name, n, leading, mask, formula, settings)
    if not settings.patterns or "core" in settings.patterns:
        yield _core_job(settings)


def _map_case(batch: int, heads: int) -> Callable:
    """Ten per cent of the tiles at random, as a choice of the top blocks would have them."""

    def case(n: int, device: torch.device):
        tiles = -(-n // BLOCK)
        chosen = torch.rand(batch, heads, tiles, tiles, device=device) < 0.1
        chosen[..., 0] = True
        mask = masks.blocks(chosen, BLOCK, max_blocks=int(chosen.sum()))
        one = batch == heads == 1
        lookup = (lambda b, h, i, j: chosen[0, 0, i // BLOCK, j // BLOCK]) if one else None
        return (batch, heads), mask, lookup

    return case


def _dense_case(n: int, device: torch.device):
    visible = torch.rand(n, n, device=device) < 0.5
    return (1, 1), masks.dense(visible), lambda b, h, i, j: visible[i, j]


def _bands_case(n: int, device: torch.device):
    def formula(b, h, i, j):
        return (i >= j) & ((i - j < 512) | (j & 63 == 0))

    return (1, 1), masks.mask_mod(formula), formula


CASES = {
    "10 % block map": _map_case(1, 1),
    "10 % block map, 4 x 16 heads": _map_case(4, 16),
    "dense mask": _dense_case,
    "mask_mod bands": _bands_case,
}


@contextlib.contextmanager
def _routed(to_native: bool):
    """Send the package to the native operators, on a GPU too, or away from them."""
    with mock.patch.object(operators, "preferred", lambda device: to_native):
        yield


def _contender(to_native: bool, device: torch.device, run: Callable, check: Callable) -> Prepare:
    def prepare():
        there = operators.available() if device.type == "cpu" else operators.has_cuda()
        if to_native and not there:
            raise Unavailable(operators.why_not() or "the library holds no CUDA operators")

        def routed():
            with _routed(to_native):
                return run()

        return routed, check(routed())

    return prepare


def _mask_job(
    name: str,
    n: int,
    leading: tuple[int, int],
    mask: masks.Mask,
    formula: Formula | None,
    settings: Settings,
) -> Job:
    device = settings.device

    def ours():
        return flashmark.compile_mask(mask, *leading, n, n, device=device, block_size=BLOCK)

    def check(found: flashmark.BlockMask) -> Row:
        with _routed(False):
            wanted = ours()
        same = all(map(torch.equal, found.tensors(), wanted.tensors()))
        row = {"density": round(found.density, 6)}
        return row if same else row | {"status": "wrong", "reason": "not the PyTorch path's lists"}

    contenders = {
        "native": _contender(True, device, ours, check),
        "pytorch": _contender(False, device, ours, lambda found: {}),
    }
    if formula is not None:

        def flex():
            return lambda: create_block_mask(formula, None, None, n, n, device=device), {}

        contenders["create_block_mask"] = flex
    common = {"suite": "native", "case": name, "n": n, "direction": "build"}
    return compare(f"{name}, N={n}", common, contenders, device, settings.rounds)


def _core_job(settings: Settings) -> Job:
    heads, landmarks, dim = CORE
    device = settings.device
    X = flashmark.init_landmarks(heads, landmarks, dim, device=device).requires_grad_()
    dcore = torch.randn(heads, landmarks, landmarks, device=device)

    def ours():
        core = flashmark.landmark_core(X)
        return core.detach(), torch.autograd.grad(core, X, dcore)[0]

    with _routed(False):
        wide = X.detach().double().requires_grad_()
        core = flashmark.landmark_core(wide)
        wanted = core.detach(), torch.autograd.grad(core, wide, dcore.double())[0]

    def check(found: tuple[Tensor, Tensor]) -> Row:
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)]
        row = {"error": max(errors), "error_allowed": 5e-5}
        if not max(errors) <= 5e-5:
            row |= {"status": "wrong", "reason": f"error {max(errors):.1e}, allowed 5e-5"}
        return row

    contenders = {
        "native": _contender(True, device, ours, check),
        "pytorch": _contender(False, device, ours, check),
    }
    common = {"suite": "landmark_core", "case": f"{heads} heads", "n": landmarks}
    common["direction"] = "forward+backward"
    return compare(f"landmark core, {heads} heads", common, contenders, device, settings.rounds)
