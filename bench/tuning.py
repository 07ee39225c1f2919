"""Suite `tuning`: candidate configs of each pass beside the one that ships, and the winners.

`python -m bench.tuning gpu.csv` prints the winners of a call that was cut short.

The candidates are those of the committed sweep (`bench.sweep`) that fit and spill no more than the
shipped config; the model's order decides which few are run. A backward pass cannot be called alone:
its config is changed, the whole backward is timed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import flashmark
from bench.compare import Job, Prepare, Settings, compare, errors_of, verdict
from bench.features import cached_decode
from bench.nystrom import float64, nystrom_contender, nystrom_inputs
from bench.oracle import Oracle
from bench.patterns import PATTERNS, random_tiles
from bench.peers import Work, flex, sdpa
from bench.timing import Run

if TYPE_CHECKING:
    from bench.candidates import Case

SWEEP = Path(__file__).parent / "results" / "sweep_sm90.csv"
MOST = 3  # candidates of a job, beside the shipped config
FORMS = ("pointers", "descriptors", "gluon")  # of the forward kernel
SUITES = {"block_sparse": "tuning", "nystrom": "tuning nystrom"}
DTYPE = torch.bfloat16


def tuning(settings: Settings) -> Iterator[Job]:
    """A job a case and form, the largest gain on paper first; with them constants of launchers."""
    from bench.candidates import all_cases  # needs Triton, as the other suites do not

    frame = pd.read_csv(SWEEP)
    cases = [case for case in all_cases() if case.family != "nystrom" or case.pass_ != "decode"]
    chosen = [(case, form, few(frame, case, form)) for case in cases for form in forms(frame, case)]
    chosen = [some for some in chosen if len(some[2]) > 1]
    chosen.sort(key=lambda some: (turn(*some[1:]), -gain(some[2])))
    if settings.quick:
        chosen = [(case, form, rows.iloc[:2]) for case, form, rows in chosen[:6]]
    if settings.on_gpu:
        compile_ahead([(case, rows) for case, _, rows in chosen], settings)
    constants = _constants(settings)
    for case, form, rows in chosen:
        if turn(form, rows):
            yield from constants  # once: it is an iterator
        yield _job(case, form, rows, settings)
    yield from constants


def turn(form: str, rows: pd.DataFrame) -> int:
    """The order of jobs: gains on paper, then other forms, then what the model expects nothing of.

    The warps of the last form wait for one another, and nobody has seen them stop: what would hang
    takes along only what comes after it.
    """
    if form == FORMS[0]:
        return 0 if gain(rows) > 1.0 else len(FORMS)
    return FORMS.index(form)


def forms(frame: pd.DataFrame, case: Case) -> list[str]:
    """The forms of the kernel that were swept for a case."""
    from bench.sweep import shippable

    return sorted({form_of(text) for text in shippable(frame, case).config}, key=FORMS.index)


def form_of(text: str) -> str:
    """The form in a written config."""
    return text.partition("form=")[2] or FORMS[0]


def few(frame: pd.DataFrame, case: Case, form: str = "pointers") -> pd.DataFrame:
    """The shipped config and the others of a form that the model likes best, two of a tile."""
    from bench.sweep import shippable

    rows = shippable(frame, case)
    if not rows.is_shipped.any():
        return rows.iloc[:0]
    others = rows[~rows.is_shipped & (rows.config.map(form_of) == form)]
    tiles = others.config.str.replace(r"num_stages=\d+", "", regex=True)
    return pd.concat([rows[rows.is_shipped], others.groupby(tiles, sort=False).head(2)[:MOST]])


def gain(rows: pd.DataFrame) -> float:
    """How much faster than the shipped config, which is first, the best is on paper."""
    return rows.predicted_ms.iloc[0] / rows.predicted_ms.min()


def compile_ahead(chosen: list[tuple[Case, pd.DataFrame]], settings: Settings) -> None:
    """Fill Triton's cache from as many processes as there are cores: compiling takes longest."""
    from bench.candidates import read
    from bench.sweep import compile_all, compile_call

    major, minor = torch.cuda.get_device_capability(settings.device)
    items = [(case, read(case.family, text)) for case, rows in chosen for text in rows.config]
    jobs = min(16, os.cpu_count() or 1)
    print(f"compiling {len(items)} configs in {jobs} processes ...", file=sys.stderr, flush=True)
    for _ in compile_all(items, f"sm_{major}{minor}", jobs, compile_call):
        pass


def _job(case: Case, form: str, rows: pd.DataFrame, settings: Settings) -> Job:
    from bench.candidates import read
    from bench.sweep import brief

    work = _work(case, settings)
    contender = (_landmark_contender if case.family == "nystrom" else _sparse_contender)(
        case, work, settings
    )
    ready = {}
    for row in rows.itertuples():
        name = f"flashmark {brief(case.family, row.config)}" + " shipped" * row.is_shipped
        columns = {"config": row.config, "predicted_ms": row.predicted_ms}
        ready[name] = functools.partial(
            _forced, case.using, read(case.family, row.config), contender, columns
        )
    ready |= _peers(case, work, settings)
    title = str(case) + f", {form}" * (form != FORMS[0])
    common = work.columns(SUITES[case.family], title)
    common["direction"] = "backward" if case.backward else "forward"
    return compare(title, common, ready, work.device, settings.rounds, ahead=True)


def _forced(using: Callable, config: object, contender: Prepare, columns: dict):
    """A contender that is checked and timed with this config."""
    with using(config):
        run, found = contender()

    def forced():
        with using(config):
            return run()

    return forced, columns | found


def _work(case: Case, settings: Settings) -> Work:
    from bench import model

    full = model.LANDMARK_N if case.family == "nystrom" else model.N
    if case.pass_ == "decode":
        full = model.CACHE
    n = full if settings.on_gpu else 256
    if case.block == 64:
        pattern = random_tiles(n, settings.device, keep=model.KEPT, size=64)
    else:
        pattern = PATTERNS["window" if case.block else "causal"](n, settings.device)
    heads = model.heads(case) if settings.on_gpu else 2
    return Work(
        pattern, 1, heads, n, case.dim, DTYPE, settings.device, case.backward, case.block or 128,
        case.marks,
    )  # fmt: skip


def _backend(settings: Settings) -> str:
    return "triton" if settings.on_gpu else "auto"


def _only(op: Callable, inputs: tuple[Tensor, ...], dout: Tensor, backward: bool) -> Run:
    """The forward without a gradient; or the backward alone, of a forward that is done."""
    if not backward:

        def forward():
            with torch.no_grad():
                return op(*inputs)

        return forward
    out = op(*inputs)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _sparse_contender(case: Case, work: Work, settings: Settings) -> Prepare:
    """Held to float64: small inputs densely, and some rows of the work where the oracle can."""
    if case.pass_ == "decode":
        return _decode_contender(work, settings)
    group = 4 if case.grouped and settings.on_gpu else 1
    plain = not (case.extras or case.grouped)
    oracle = functools.cache(lambda: Oracle(work))
    options = {"backend": _backend(settings)}
    if case.backward:
        options["deterministic"] = case.pass_ != "backward_fused"

    def prepare():
        query, key, value = work.inputs()
        key, value = (
            x.detach()[:, : work.heads // group].requires_grad_(case.backward) for x in (key, value)
        )
        mask = flashmark.compile_mask(
            work.pattern.mask, 1, 1, work.n, work.n, device=work.device, block_size=work.block_size
        )
        inputs = [query, key, value]
        if case.extras:
            shape = work.heads, 2 * work.n - 1
            inputs.append(torch.randn(shape, device=work.device).requires_grad_(case.backward))

        def op(query, key, value, *bias):
            bias = {"bias": bias[0]} if bias else {}
            return flashmark.block_sparse_attention(query, key, value, mask, **bias, **options)

        errors = _errors_when_small(case, work, options)
        if plain:
            full = oracle().errors(op)
            errors |= {f"{name} at full size": found for name, found in full.items()}
        dout = torch.randn_like(query)
        products = 2 if not case.backward else 5 if case.pass_ == "backward_fused" else 7
        flops = 2 * products * work.heads * work.n**2 * work.dim * mask.density
        return _only(op, tuple(inputs), dout, case.backward), verdict(errors) | {"flops": flops}

    return prepare


def _errors_when_small(case: Case, work: Work, options: dict) -> dict[str, tuple[float, float]]:
    """Against the dense reference in float64, with the features that the pass is compiled for."""
    n = 600
    make = functools.partial(torch.randn, device=work.device)
    heads = 2 if case.grouped else 4
    query = make(1, 4, n, case.dim).to(DTYPE)
    key, value = (make(1, heads, n, case.dim).to(DTYPE) for _ in range(2))
    mask = flashmark.masks.causal() & flashmark.masks.sliding_window(300)
    if not case.block:
        mask = flashmark.masks.causal()
    mask = flashmark.compile_mask(mask, 1, 1, n, n, device=work.device, block_size=work.block_size)
    bias = {"bias": make(4, 2 * n - 1)} if case.extras else {}
    op = flashmark.block_sparse_attention
    return errors_of(flashmark.check(op, query, key, value, mask, **bias, **options))


def _decode_contender(work: Work, settings: Settings) -> Prepare:
    batch, heads, kv_heads = (8, 32, 4) if settings.on_gpu else (1, 2, 1)
    make = functools.partial(torch.randn, device=work.device)
    query = make(batch, heads, 1, work.dim).to(DTYPE)
    key, value = (make(batch, kv_heads, work.n, work.dim).to(DTYPE) for _ in range(2))
    return cached_decode(query, key, value, _backend(settings))


def _landmark_contender(case: Case, work: Work, settings: Settings) -> Prepare:
    truth = functools.cache(lambda: float64(work))
    backend = _backend(settings)
    op = functools.partial(
        flashmark.nystrom_attention, backend=backend, is_causal=case.pass_ != "read"
    )

    def prepare():
        inputs, dout = nystrom_inputs(work)
        if case.pass_ == "read":
            small = [x.detach()[:, :2, :600] for x in inputs[:3]]
            report = flashmark.check(
                flashmark.nystrom_attention, *small, inputs[3][:2], backend=backend, is_causal=False
            )
            columns = verdict(errors_of(report))
        else:
            _, columns = nystrom_contender(backend, work, truth)()
        return _only(op, inputs, dout, case.backward), columns

    return prepare


def _peers(case: Case, work: Work, settings: Settings) -> dict[str, Prepare]:
    """PyTorch's own attention, where it does the same work."""
    if case.family == "nystrom" or case.extras or case.grouped or not settings.on_gpu:
        return {}
    if case.block and case.backward:  # a compiled backward cannot be called twice
        return {}
    kinds = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    fighters = [sdpa(kind) for kind in kinds] if not case.block else [flex()]

    def ready(fighter):
        def prepare():
            attention = fighter.prepare(work)
            inputs = work.inputs()
            return _only(attention, inputs, torch.randn_like(inputs[0]), case.backward), {}

        return prepare

    return {fighter.name: ready(fighter) for fighter in fighters}


@contextlib.contextmanager
def _set(module: object, name: str, value: int) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _constants(settings: Settings) -> Iterator[Job]:
    """Numbers of the launchers: tokens between stored states, and what should fit the L2 cache."""
    from bench.candidates import Case
    from flashmark.kernels.block_sparse import arguments
    from flashmark.kernels.nystrom import configs

    backward = Case("nystrom", "keys", 64, 64)
    for name, module, values, case in (
        ("FORWARD_SPAN", configs, (512, 256, 1024, 2048), Case("nystrom", "forward", 64, 64)),
        ("BACKWARD_SPAN", configs, (256, 128, 512), backward),
        (
            "L2_BYTES",
            arguments,
            (24 << 20, 0, 12 << 20, 48 << 20),
            Case("block_sparse", "forward", 128),
        ),
    ):
        work = _work(case, settings)
        make = _landmark_contender if case.family == "nystrom" else _sparse_contender
        contender = make(case, work, settings)
        ready = {}
        for value in values[: 2 if settings.quick else None]:
            shipped = value == getattr(module, name)
            ready[f"flashmark {name}={value}" + " shipped" * shipped] = functools.partial(
                _forced, functools.partial(_set, module, name), value, contender,
                {"config": f"{name}={value}", "predicted_ms": math.nan},
            )  # fmt: skip
        common = work.columns(SUITES[case.family], f"{name}: {case}")
        common["direction"] = "backward" if case.backward else "forward"
        yield compare(f"{name}: {case}", common, ready, work.device, settings.rounds, ahead=True)


def winners(frame: pd.DataFrame) -> str:
    """Markdown, a line a case of the suite: shipped, best, their ratio, and what was predicted."""
    lines = [
        "| pass | shipped ms | best ms | best config | ratio | predicted | fastest peer, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, rows in frame[frame.suite.isin(SUITES.values())].groupby("case", sort=False):
        ran = rows[(rows.status == "ok") & rows.p50_ms.notna()] if "p50_ms" in rows else rows[:0]
        ours = ran[ran.contender.str.startswith("flashmark")]
        shipped = ours[ours.contender.str.endswith("shipped")]
        if shipped.empty:
            lines.append(f"| {case} | not measured | | | | | |")
            continue
        shipped, best = shipped.iloc[0], ours.loc[ours.p50_ms.idxmin()]
        peers = ran[~ran.contender.str.startswith("flashmark")]
        peer = "" if peers.empty else f"{peers.p50_ms.min():.4g}"
        predicted = shipped.predicted_ms / best.predicted_ms
        predicted = "" if math.isnan(predicted) else f"{predicted:.2f}"
        cells = [
            case, f"{shipped.p50_ms:.4g}", f"{best.p50_ms:.4g}", best.config,
            f"{shipped.p50_ms / best.p50_ms:.2f}", predicted, peer,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(winners(pd.read_csv(sys.argv[1])))
