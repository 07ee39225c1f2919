"""Suite `routed`: attention over chosen blocks beside exact attention, and the choice's share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import flashmark
from bench.compare import Job, Prepare, Settings, compare, forward_and_backward, verdict
from bench.oracle import relative_error
from bench.peers import Unavailable, dtype_name
from flashmark.routed import routing
from flashmark.routed.checks import check_call

HEADS, KV_HEADS, DIM, LANDMARKS = 8, 2, 64, 4
BLOCK, TOP_K, NEAR = 64, 16, 1
SMALL = 1500  # tokens of the comparison with the definition in float64
LONGEST = 16384  # tokens of exact gradients on a CPU, where longer ones take minutes
BUDGETS = {"out": 1e-5, "d query": 5e-5, "d key": 5e-5, "d value": 5e-5}  # relative, float32
ROUTED = functools.partial(
    flashmark.routed_attention, block_size=BLOCK, top_k=TOP_K, near=NEAR, scale=DIM**-0.5
)


def routed(settings: Settings) -> Iterator[Job]:
    """Forward, forward + backward, and a decoded token with the summaries at hand."""
    lengths = settings.choose_lengths(cpu=(2048, 8192, 16384, 65536), gpu=(16384, 65536, 262144))
    for n in lengths:
        for direction in ("forward", "forward+backward", "decode"):
            yield _job(n, direction, settings)


def _job(n: int, direction: str, settings: Settings) -> Job:
    case = f"routed, {LANDMARKS} landmarks, {TOP_K} of {BLOCK}"
    common = {
        "suite": "routed", "case": case, "batch": 1, "heads": HEADS, "n": n, "dim": DIM,
        "dtype": dtype_name(torch.float32), "direction": direction,
    }  # fmt: skip
    ours = "flashmark triton" if settings.on_gpu else "flashmark cpu"
    make = functools.cache(lambda: _inputs(n, direction, settings.device))
    ready = {
        ours: _routed(make, direction),
        "flashmark choice": _choice(make, direction),
        "flashmark dense": _exact(make, direction, _dense, settings),
        "sdpa causal": _exact(make, direction, _sdpa, settings),
    }
    return compare(f"{case}, N={n}, {direction}", common, ready, settings.device, settings.rounds)


def _inputs(n: int, direction: str, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """(query, key, value), landmarks; one query, the last, for decoding."""
    generator = torch.Generator(device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=device)
    rows = 1 if direction == "decode" else n
    shapes = ((HEADS, rows), (KV_HEADS, n), (KV_HEADS, n))
    tensors = tuple(
        make(1, *shape, DIM).requires_grad_(direction == "forward+backward") for shape in shapes
    )
    return tensors, make(KV_HEADS, LANDMARKS, DIM)


def _state(key: Tensor, landmarks: Tensor) -> flashmark.RoutedState:
    """Summaries of the finished blocks, as an earlier call returns them."""
    query = key[:, :, -1:].repeat_interleave(HEADS // KV_HEADS, 1)
    return ROUTED(query, key, key, landmarks, return_state=True)[1]


def _routed(make: Callable, direction: str) -> Prepare:
    def prepare():
        inputs, landmarks = make()
        op = functools.partial(ROUTED, landmarks=landmarks)
        if direction == "decode":
            op = functools.partial(op, state=_state(inputs[1], landmarks))
        run = forward_and_backward(
            op, inputs, torch.randn_like(inputs[0]), direction == "forward+backward"
        )
        return run, verdict(_errors(inputs, landmarks, direction))

    return prepare


def _errors(inputs, landmarks: Tensor, direction: str) -> dict[str, tuple[float, float]]:
    """Errors of the first tokens against the dense definition in float64, on the same choice."""
    small = [x[:, :, :SMALL].detach().clone().requires_grad_() for x in inputs]
    out, found = ROUTED(*small, landmarks, return_routing=True)
    wide = [x.detach().double().requires_grad_() for x in small]
    expected = flashmark.block_topk_attention(
        *wide, found.indices, block_size=BLOCK, near=NEAR, scale=DIM**-0.5, backend="reference"
    )
    pairs = [(out, expected)]
    if direction == "forward+backward":
        dout = torch.randn_like(out)
        pairs += zip(
            torch.autograd.grad(out, small, dout),
            torch.autograd.grad(expected, wide, dout.double()),
            strict=True,
        )
    return {
        name: (relative_error(actual.detach(), wanted.detach()), BUDGETS[name])
        for name, (actual, wanted) in zip(BUDGETS, pairs, strict=False)
    }


def _choice(make: Callable, direction: str) -> Prepare:
    """Summaries and choice alone."""

    def prepare():
        if direction == "forward+backward":
            raise Unavailable("as in the forward: the choice has no backward")
        (query, key, value), landmarks = make()
        before = _state(key, landmarks) if direction == "decode" else None
        checked = check_call(
            query, key, value, BLOCK, NEAR, DIM**-0.5, None, None, None, None, None, None, "auto"
        )

        def run():
            with torch.no_grad():
                state = routing._summaries(before, key, landmarks, checked, BLOCK)
                return routing._chosen(query, key, state, None, TOP_K, BLOCK, NEAR, checked)

        return run, {}

    return prepare


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    causal = query.shape[2] == key.shape[2]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = flashmark.masks.causal() if query.shape[2] == key.shape[2] else None
    return flashmark.block_sparse_attention(query, key, value, mask)


def _exact(make: Callable, direction: str, op: Callable, settings: Settings) -> Prepare:
    def prepare():
        inputs, _ = make()
        if direction == "forward+backward" and inputs[1].shape[2] > LONGEST and not settings.on_gpu:
            raise Unavailable(f"quadratic: left out beyond N={LONGEST}")
        return forward_and_backward(
            op, inputs, torch.randn_like(inputs[0]), direction == "forward+backward"
        ), {}

    return prepare
