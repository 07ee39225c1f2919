"""Suites for the cost of masks, biases and caches: `density`, `bias`, `decode`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import flashmark
from bench.compare import (
    Job,
    Prepare,
    Settings,
    compare,
    errors_of,
    forward_and_backward,
    verdict,
)
from bench.masks import attention_job
from bench.oracle import relative_error
from bench.patterns import causal, random_tiles
from bench.peers import Work, ours, sdpa

KEPT = (1.0, 0.5, 0.25, 0.1)  # of the tiles under the diagonal


def density(settings: Settings) -> Iterator[Job]:
    """Random tiles, fewer and fewer: time should fall with density. Blocks of 128 and 64."""
    dtype = settings.dtypes[0] if settings.dtypes else _dtype(settings)
    for n in settings.choose_lengths(cpu=(4096,), gpu=(16384,)):
        for block in (128, 64):
            for kept in KEPT:
                pattern = random_tiles(n, settings.device, keep=kept, size=block)
                for backward in (False, True):
                    dim, heads = (128, 16) if settings.on_gpu else (64, 8)
                    work = Work(pattern, 1, heads, n, dim, dtype, settings.device, backward, block)
                    yield attention_job(
                        work, [ours(_backend(settings))], settings.rounds, suite=f"density {block}"
                    )


def bias(settings: Settings) -> Iterator[Job]:
    """Causal attention with and without a relative bias that has a gradient."""
    dtype = settings.dtypes[0] if settings.dtypes else _dtype(settings)
    for n in settings.choose_lengths(cpu=(2048,), gpu=(8192,)):
        for dim in (64, 128) if settings.on_gpu else (64,):
            heads = 2048 // dim if settings.on_gpu else 8
            work = Work(causal(n, settings.device), 1, heads, n, dim, dtype, settings.device, True)
            common = work.columns("bias", "causal")
            ready = {
                f"flashmark {name}": functools.partial(_biased, work, settings, name == "bias")
                for name in ("plain", "bias")
            }
            yield compare(
                f"relative bias, N={n}, D={dim}", common, ready, work.device, settings.rounds
            )


def _biased(work: Work, settings: Settings, with_bias: bool):
    backend = _backend(settings)

    def attention(query, key, value, *bias):
        return flashmark.block_sparse_attention(
            query, key, value, flashmark.masks.causal(), bias=bias[0] if bias else None,
            backend=backend,
        )  # fmt: skip

    inputs = list(work.inputs())
    if with_bias:
        shape = work.heads, 2 * work.n - 1
        inputs.append(torch.randn(shape, device=work.device).requires_grad_())
    small = [x.detach()[:, :2, :500] for x in inputs[:3]]
    small += [x.detach()[:2, work.n - 500 : work.n + 499] for x in inputs[3:]]
    check = functools.partial(
        flashmark.check, flashmark.block_sparse_attention, *small[:3], flashmark.masks.causal(),
        backend=backend,
    )  # fmt: skip
    columns = verdict(errors_of(check(bias=small[3]) if with_bias else check()))
    dout = torch.randn_like(inputs[0])
    return forward_and_backward(attention, inputs, dout, True), columns


def decode(settings: Settings) -> Iterator[Job]:
    """One more token after a cache of n keys, 8 query heads to a key head."""
    dtype = settings.dtypes[0] if settings.dtypes else _dtype(settings)
    for n in settings.choose_lengths(cpu=(8192,), gpu=(8192, 65536)):
        batch, heads, kv_heads, dim = (8, 32, 4, 128) if settings.on_gpu else (1, 8, 1, 64)
        work = Work(causal(n, settings.device), batch, heads, n, dim, dtype, settings.device, False)
        make = functools.partial(torch.randn, device=work.device)
        query = make(batch, heads, 1, dim).to(dtype)
        key, value = (make(batch, kv_heads, n, dim).to(dtype) for _ in range(2))
        common = work.columns("decode", "one token")
        ready = {
            f"flashmark {_backend(settings)}": cached_decode(query, key, value, _backend(settings)),
            sdpa().name: _sliced(query, key, value),
        }
        yield compare(f"decode, N={n}", common, ready, work.device, settings.rounds)


def cached_decode(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Prepare:
    def prepare():
        n = key.shape[2]
        mask = flashmark.compile_mask(flashmark.masks.causal(), 1, 1, n, n, device=key.device)
        lengths = torch.full((query.shape[0],), n, dtype=torch.int32, device=key.device)

        def run():
            return flashmark.block_sparse_attention(
                query, key, value, mask, query_offset=lengths - 1, kv_lengths=lengths,
                backend=backend,
            )  # fmt: skip

        return run, _against_float64(run(), query, key, value)

    return prepare


def _sliced(query: Tensor, key: Tensor, value: Tensor) -> Prepare:
    def prepare():
        def run():
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return run, _against_float64(run(), query, key, value)

    return prepare


def _against_float64(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> dict:
    exact, plain = (
        F.scaled_dot_product_attention(*(x.to(dtype) for x in (query, key, value)), enable_gqa=True)
        for dtype in (torch.float64, query.dtype)
    )
    allowed = 1e-5 if query.dtype == torch.float32 else 2 * relative_error(plain, exact) + 2e-3
    return verdict({"out": (relative_error(out, exact), allowed)})


def _dtype(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.on_gpu else torch.float32


def _backend(settings: Settings) -> str:
    return "triton" if settings.on_gpu else "auto"
