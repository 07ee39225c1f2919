"""Suite `curves`: attention over lengths from 1k to 64k, time and peak memory, for one picture.

Run by its own name only, into its own CSV: `python -m bench curves`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import flashmark
from bench.compare import Job, Prepare, Row, Settings, compare, forward_and_backward
from bench.masks import attention_contender
from bench.nystrom import float64, nystrom_contender, nystrom_inputs
from bench.oracle import Oracle
from bench.patterns import PATTERNS
from bench.peers import Attention, Contender, Unavailable, Work, dtype_name, first_line, ours, sdpa

LENGTHS = tuple(1024 * 2**power for power in range(7))
HEADS, DIM = 8, 64
LIMIT = 8.0  # seconds: a call expected to take longer is left out
BUDGET = 6.0  # seconds of samples at one length, after which no further round starts


def curves(settings: Settings) -> Iterator[Job]:
    """Window 512, causal and Nyström attention beside SDPA and compiled FlexAttention."""
    lengths = settings.lengths or ((256, 512, 1024) if settings.quick else LENGTHS)
    dtype = (settings.dtypes or (torch.bfloat16 if settings.on_gpu else torch.float32,))[0]
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=True)
    for backward in (False, True):
        measured: dict[str, Row] = {}  # the last length of each curve
        for n in lengths:
            yield _job(n, lengths[0], dtype, backward, measured, compiled, settings)


def _job(
    n: int,
    shortest: int,
    dtype: torch.dtype,
    backward: bool,
    measured: dict[str, Row],
    compiled: Callable,
    settings: Settings,
) -> Job:
    backend = "triton" if settings.on_gpu else "cpu"
    work = {
        name: Work(PATTERNS[name](n, settings.device), 1, HEADS, n, DIM, dtype, settings.device,
                   backward)
        for name in ("window", "causal")
    }  # fmt: skip
    fighters = {
        "flashmark window 512": (ours(backend), work["window"]),
        "flashmark causal": (ours(backend), work["causal"]),
        "sdpa causal": (sdpa(), work["causal"]),
        "flex window 512": (_flex(compiled), work["window"]),
        "flex causal": (_flex(compiled), work["causal"]),
    }
    ready = {name: _attention(*fighter, first=n == shortest) for name, fighter in fighters.items()}
    ready[f"flashmark Nyström M={work['causal'].landmarks}"] = _nystrom(
        backend, work["causal"], first=n == shortest
    )
    ready = {name: _in_time(name, run, n, measured) for name, run in ready.items()}

    common = work["causal"].columns("curves", "attention")
    title = f"N={n}, {dtype_name(dtype)}, {work['causal'].direction}"
    job = compare(title, common, ready, settings.device, settings.rounds, budget=BUDGET)

    def run(step: Callable[[], object]) -> list[Row]:
        rows = job.run(step)
        measured.update({str(row["contender"]): row for row in rows})
        return rows

    return dataclasses.replace(job, run=run)


def _attention(fighter: Contender, work: Work, *, first: bool) -> Prepare:
    """Contender checked against float64 at a curve's first length; other suites check others."""
    if first:
        return attention_contender(fighter, work, lambda: Oracle(work))

    def prepare():
        attention, inputs = fighter.prepare(work), work.inputs()
        return forward_and_backward(
            attention, inputs, torch.randn_like(inputs[0]), work.backward
        ), {}

    return prepare


def _nystrom(backend: str, work: Work, *, first: bool) -> Prepare:
    if first:
        return nystrom_contender(backend, work, lambda: float64(work))
    op = functools.partial(flashmark.nystrom_attention, backend=backend)

    def prepare():
        inputs, dout = nystrom_inputs(work)
        return forward_and_backward(op, inputs, dout, work.backward), {}

    return prepare


def _in_time(name: str, prepare: Prepare, n: int, measured: dict[str, Row]) -> Prepare:
    """Leave out contenders that failed at the length before, or would take longer than LIMIT."""
    power = 2 if name.endswith("causal") else 1

    def unless_too_long():
        before = measured.get(name)
        if before is not None and before["status"] != "ok":
            raise Unavailable(str(before["reason"]))
        seconds = before["p50_ms"] / 1e3 if before else 0.0
        if before is not None and seconds * (n / before["n"]) ** power > LIMIT:
            raise Unavailable(
                f"left out beyond N={before['n']}: {seconds:.2g} s there, and a call may take "
                f"{LIMIT:g} s"
            )
        return prepare()

    return unless_too_long


def _flex(compiled: Callable) -> Contender:
    """FlexAttention compiled once for all lengths; our tile lists spare its N x N mask building."""

    def prepare(work: Work) -> Attention:
        if work.backward and work.device.type == "cpu":
            raise Unavailable("FlexAttention has no backward on CPU")
        mask = flashmark.compile_mask(work.pattern.mask, 1, 1, work.n, work.n, device=work.device)
        lists = flashmark.masks.to_flex(mask)
        mask = BlockMask.from_kv_blocks(
            lists.kv_num_blocks,
            lists.kv_indices,
            lists.full_kv_num_blocks,
            lists.full_kv_indices,
            BLOCK_SIZE=lists.BLOCK_SIZE,
            mask_mod=work.pattern.formula,
            seq_lengths=(work.n, work.n),
        )
        try:
            compiled(*work.inputs(), block_mask=mask)
        except Exception as error:  # the compiler's errors share no base class
            raise Unavailable(first_line(error)) from error
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    return Contender("flex", prepare)
