"""Suites `masks` and `mask_build`: exact attention under masks, and what it costs to build them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashmark
from bench.compare import Job, Prepare, Settings, compare, forward_and_backward, verdict
from bench.oracle import Oracle
from bench.patterns import PATTERNS, Formula
from bench.peers import Contender, Work, contenders, ours, pointers, tuned_contenders

# masks, at D = 128, for which a GPU run compiles FlexAttention: each takes a quarter of a minute
FLEX_ON_GPU = ("causal", "window", "documents")


def masks(settings: Settings) -> Iterator[Job]:
    """Exact attention under masks, forward and forward + backward."""
    patterns = settings.patterns or (tuple(PATTERNS) if settings.on_gpu else ("causal", "window"))
    dtypes = (torch.bfloat16,) if settings.on_gpu else (torch.float32, torch.bfloat16)
    for dtype in settings.dtypes or dtypes:
        for name in patterns:
            gpu = (8192, 16384) if name == "causal" else (16384,)
            for n in settings.choose_lengths(cpu=(8192,), gpu=gpu):
                pattern = PATTERNS[name](n, settings.device)
                for dim in (64, 128) if settings.on_gpu else (64,):
                    batch, heads = (max(1, 16384 // n), 2048 // dim) if settings.on_gpu else (1, 8)
                    for backward in (False, True):
                        work = Work(pattern, batch, heads, n, dim, dtype, settings.device, backward)
                        with_flex = not settings.on_gpu or (
                            name in FLEX_ON_GPU and dim == 128 and n == 16384
                        )
                        fighters = contenders(work.device, with_flex)
                        yield attention_job(work, fighters, settings.rounds)


def forms(settings: Settings) -> Iterator[Job]:
    """On a GPU: both forms of the forward kernel, Hopper's, which is the default, and any GPU's."""
    for name in settings.patterns or ("causal", "window"):
        for n in settings.choose_lengths(cpu=(1024,), gpu=(16384,)):
            pattern = PATTERNS[name](n, settings.device)
            for dim in (64, 128):
                work = Work(
                    pattern, 1, 2048 // dim, n, dim, torch.bfloat16, settings.device, False
                )  # fmt: skip
                both = [ours("triton"), pointers()]
                yield attention_job(work, both, settings.rounds, suite="forms")


def tuned(settings: Settings) -> Iterator[Job]:
    """On a GPU: against FlexAttention tuned for the shapes, which takes it minutes."""
    for name in settings.patterns or ("causal", "window"):
        for n in settings.choose_lengths(cpu=(1024,), gpu=(16384,)):
            pattern = PATTERNS[name](n, settings.device)
            for backward in (False, True):
                work = Work(pattern, 1, 16, n, 128, torch.bfloat16, settings.device, backward)
                yield attention_job(work, tuned_contenders(), settings.rounds, suite="tuned")


def attention_job(work: Work, fighters: list[Contender], rounds: int, suite: str = "masks") -> Job:
    case = work.pattern.name
    oracle = functools.cache(lambda: Oracle(work))
    ready = {fighter.name: attention_contender(fighter, work, oracle) for fighter in fighters}
    return compare(work.title(case), work.columns(suite, case), ready, work.device, rounds)


def attention_contender(fighter: Contender, work: Work, oracle: Callable[[], Oracle]) -> Prepare:
    def prepare():
        attention = fighter.prepare(work)
        inputs, dout = oracle().inputs, torch.randn_like(oracle().dout)
        if fighter.follows(work.pattern):
            density = _compile(work.pattern, work.n, work.device, work.block_size).density
            columns = verdict(oracle().errors(attention))
        else:
            density, columns = (work.n + 1) / (2 * work.n), {}
        products = 14 if work.backward else 4  # 2 and 5 matrix products
        size = work.batch * work.heads * work.n**2 * work.dim
        columns |= {"density": round(density, 6), "flops": products * size * density}

        return forward_and_backward(attention, inputs, dout, work.backward), columns

    return prepare


def mask_build(settings: Settings) -> Iterator[Job]:
    """Compiling a mask, against FlexAttention's `create_block_mask`."""
    for name in settings.patterns or ("causal", "window", "documents"):
        for n in settings.choose_lengths(cpu=(8192,), gpu=(8192, 32768)):
            yield _build_job(name, n, settings)


def _build_job(name: str, n: int, settings: Settings) -> Job:
    device = settings.device
    pattern = PATTERNS[name](n, device)

    def ours():
        mask = _compile(pattern, n, device)
        columns = {"density": round(mask.density, 6)}
        if not _same_elements(mask, pattern.formula):
            columns |= {"status": "wrong", "reason": "elements differ from the formula's"}
        return lambda: _compile(pattern, n, device), columns

    def flex():
        return lambda: create_block_mask(pattern.formula, None, None, n, n, device=device), {}

    common = {"suite": "mask_build", "case": pattern.name, "n": n, "direction": "build"}
    both = {"flashmark": ours, "create_block_mask": flex}
    # on the host, so the GPU is not kept busy meanwhile
    title = f"building {pattern.name}, N={n}"
    return compare(title, common, both, device, settings.rounds, ahead=False)


def _compile(pattern, n: int, device: torch.device, block_size: int = 128) -> flashmark.BlockMask:
    return flashmark.compile_mask(pattern.mask, 1, 1, n, n, device=device, block_size=block_size)


def _same_elements(mask: flashmark.BlockMask, formula: Formula) -> bool:
    zero = torch.zeros((), dtype=torch.long, device=mask.device)
    index = torch.arange(mask.q_len, device=mask.device)
    dense = mask.to_dense()[0, 0]
    return all(
        torch.equal(dense[some], formula(zero, zero, some[:, None], index))
        for some in index.split(1024)
    )
