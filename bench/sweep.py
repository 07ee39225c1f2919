"""Compile the candidate configs for a GPU that is not there: `python -m bench.sweep --help`.

One line of CSV a config: registers, spills, shared memory, matrix instructions, and how many
programs a multiprocessor holds. `--table` prints what came out, beside what the model predicts, and
what it predicts of the configs that ship; `--page` puts both tables into docs/tuning.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd
import triton
from tqdm import tqdm

from bench.candidates import Case, Config, all_cases, read, written
from bench.model import flops, predict, programs_of_a_processor
from bench.offline import SHARED_MEMORY, Report, compiling_for, inspect, parse_target
from bench.targets import MATRIX

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/tuning.md"
WORTH_A_SPILL = 1.25
KEYS = ["family", "pass", "dim", "marks", "block", "extras", "config", "triton"]
Item = tuple[Case, Config]


def main() -> int:
    arguments = parse()
    path = arguments.out or RESULTS / f"sweep_{arguments.arch.replace('_', '')}.csv"
    cases = [case for case in all_cases() if chosen(case, arguments)]
    if arguments.table or arguments.page:
        frame = pd.read_csv(path)
        for text in (table(frame, cases), predictions(frame, cases)):
            if arguments.page:
                PAGE.write_text(with_table(PAGE.read_text(), text))
            else:
                print(text, end="\n\n")
        return 0
    before = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEYS)
    if arguments.again:
        before = before[~before.apply(lambda row: chosen(case_of(row), arguments), axis=1)]
    done = {tuple(row) for row in before[KEYS].itertuples(index=False)}
    arch = parse_target(arguments.arch)
    items = [(case, config) for case in cases for config in case.candidates(arch)]
    items = [item for item in items if tuple(described(*item).values()) not in done]
    rows = before.to_dict("records")
    with tqdm(total=len(items), unit="config", file=sys.stderr) as bar:
        for row in compile_all(items, arguments.arch, arguments.jobs, compile_one):
            rows.append(row)
            bar.set_description(f"{row['pass']} {row['config']}")
            bar.update()
            ordered(pd.DataFrame(rows)).to_csv(path, index=False)
    print("wrote", path)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families, passes = (
        {getattr(case, name) for case in all_cases()} for name in ("family", "pass_")
    )
    parser.add_argument("--families", nargs="+", default=[], choices=sorted(families))
    parser.add_argument("--passes", nargs="+", default=[], choices=sorted(passes))
    targets = [f"sm_{n}" for n in SHARED_MEMORY if isinstance(n, int)]
    parser.add_argument("--arch", default="sm_90", choices=targets)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--again", action="store_true", help="also what the CSV already has")
    parser.add_argument("--table", action="store_true", help="print what the CSV has, as Markdown")
    parser.add_argument("--page", action="store_true", help="the same, into docs/tuning.md")
    parser.add_argument("--out", type=Path, help="CSV (default bench/results/sweep_<arch>.csv)")
    return parser.parse_args()


def with_table(page: str, text: str) -> str:
    """A page of Markdown with the table of the same heading replaced."""
    heading = text.splitlines()[0]
    before, found, rest = page.partition(heading + "\n")
    if not found:
        raise SystemExit(f"{PAGE.name}: expected a table headed {heading!r}, got none")
    after = itertools.dropwhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True))
    return before + text + "\n" + "".join(after)


def chosen(case: Case, arguments: argparse.Namespace) -> bool:
    families, passes = arguments.families, arguments.passes
    return (not families or case.family in families) and (not passes or case.pass_ in passes)


def described(case: Case, config: Config) -> dict[str, object]:
    """The columns that tell one compilation from another, `KEYS`."""
    return {
        "family": case.family,
        "pass": case.pass_,
        "dim": case.dim,
        "marks": case.marks,
        "block": case.block,
        "extras": case.extras,
        "config": written(config),
        "triton": triton.__version__,
    }


def case_of(row) -> Case:
    """The case of a line of the CSV."""
    return Case(row["family"], row["pass"], row["dim"], row["marks"], row["block"], row["extras"])


def of_case(frame: pd.DataFrame, case: Case) -> pd.DataFrame:
    """The lines of the CSV that a case has."""
    same = (frame["pass"] == case.pass_) & (frame.dim == case.dim) & (frame.marks == case.marks)
    same &= (frame.family == case.family) & (frame.block == case.block)
    return frame[same & (frame.extras == case.extras)]


def compile_all(
    items: list[Item], arch: str, jobs: int, work: Callable[[Item, str], object]
) -> Iterator[object]:
    """`work(item, arch)` for each item, in this process or in `jobs` of their own."""
    if jobs == 1:
        yield from (work(item, arch) for item in items)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        done = [pool.submit(work, item, arch) for item in items]
        yield from (each.result() for each in concurrent.futures.as_completed(done))


def compile_call(item: Item, arch: str) -> None:
    """Whatever a call launches under a config, pieces and other passes too: Triton caches it."""
    case, config = item
    with contextlib.suppress(Exception), compiling_for(parse_target(arch)), case.using(config):
        case.launch()  # what cannot compile says so when it is run


def compile_one(item: Item, arch: str) -> dict[str, object]:
    """What the compiler makes of one config: `status` is "ok", "too big" or "refused"."""
    case, config = item
    row = described(case, config)
    try:
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            with compiling_for(parse_target(arch), case.wanted) as launches, case.using(config):
                case.launch()
        reports = [inspect(*launch) for launch in launches]
    except Exception as error:  # the compiler's errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return row | {"status": "refused", "reason": f"{type(error).__name__}: {reason}"}
    return row | summary(reports, SHARED_MEMORY[parse_target(arch)])


def summary(reports: list[Report], limit: int) -> dict[str, object]:
    """The launches of a pass in one line: the worst of each, matrix instructions added up."""
    worst = {name: max(getattr(r, name) for r in reports) for name in ("registers", "spilled")}
    shared = max(r.shared for r in reports)
    return {
        "status": "ok" if shared <= limit else "too big",
        "launches": len(reports),
        "threads": reports[0].threads,
        **worst,
        "shared": shared,
        "hgmma": sum(r.hgmma for r in reports),
        "hmma": sum(r.hmma for r in reports),
        "programs": min(programs_of_a_processor(r.registers, r.threads, r.shared) for r in reports),
    }


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Whatever order they were compiled in, one order in the file."""
    order = {case: n for n, case in enumerate(all_cases())}
    place = frame.apply(lambda row: order.get(case_of(row), len(order)), axis=1)
    whole = ["launches", "threads", "registers", "spilled", "shared", "hgmma", "hmma", "programs"]
    frame = frame.astype({name: "Int64" for name in whole if name in frame})
    return frame.assign(place=place).sort_values(["place", "config"]).drop(columns="place")


def shippable(frame: pd.DataFrame, case: Case) -> pd.DataFrame:
    """Of a case: what fits, and may be worth running, fastest prediction first.

    What spills more than the shipped config must be `WORTH_A_SPILL` times as fast on paper, where
    spills count. Columns `predicted_ms` and `is_shipped` are added.
    """
    rows = of_case(frame, case)
    rows = rows[(rows.status == "ok") & (rows.programs > 0)].copy()
    rows["is_shipped"] = rows.config == written(case.shipped())
    rows["predicted_ms"] = [
        predict(case, read(case.family, row.config), row.programs, row.spilled).ms
        for row in rows.itertuples()
    ]
    ours = rows[rows.is_shipped]
    if len(ours):
        gains = ours.predicted_ms.iloc[0] / rows.predicted_ms
        rows = rows[(rows.spilled <= ours.spilled.iloc[0]) | (gains >= WORTH_A_SPILL)]
    return rows.sort_values("predicted_ms", kind="stable")


def table(frame: pd.DataFrame, cases: Iterable[Case]) -> str:
    """Markdown, a line a case: the shipped config, the best on paper, and how many were tried."""
    lines = [
        "| pass | swept, fit, do not spill | shipped: registers, programs | predicted ms "
        "| best on paper: registers, programs | predicted ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        swept = of_case(frame, case)
        rows = shippable(frame, case)
        if not rows.is_shipped.any():
            continue
        ours, best = rows[rows.is_shipped].iloc[0], rows.iloc[0]
        fit = swept[swept.status == "ok"]
        counts = f"{len(swept)}, {len(fit)}, {(fit.spilled == 0).sum()}"
        cells = [f"{case.family.replace('_', '-')} {case}", counts]
        for row in (ours, best):
            cells += [_brief(row), f"{row.predicted_ms:.3g}"]
        lines.append(
            "| " + " | ".join([*cells, f"{ours.predicted_ms / best.predicted_ms:.2f}"]) + " |"
        )
    return "\n".join(lines)


def predictions(frame: pd.DataFrame, cases: Iterable[Case]) -> str:
    """Markdown: what the model says of the configs that ship, to be held against measurements."""
    lines = [
        "| pass | shipped | Tflop | ms by products | predicted ms | what binds | measured ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rows = shippable(frame, case)
        if case.block or case.extras or case.pass_ == "decode" or not rows.is_shipped.any():
            continue
        row = rows[rows.is_shipped].iloc[0]
        found = predict(case, read(case.family, row.config), row.programs, row.spilled)
        floor = 1e3 * flops(case) / MATRIX
        cells = [
            f"{case.family.replace('_', '-')} {case}",
            brief(case.family, row.config),
            f"{flops(case) / 1e12:.3g}",
            f"{floor:.3g}",
            f"{found.ms:.3g}",
            f"{found.binds}, {found.parts[found.binds]:.3g}",
            "not measured",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _brief(row: pd.Series) -> str:
    """128x64/8 s3: 206, 1; and bytes spilled, if any."""
    spills = f", spills {row.spilled}" if row.spilled else ""
    return f"{brief(row.family, row.config)}: {row.registers}, {row.programs}{spills}"


def brief(family: str, text: str) -> str:
    """A written config in few words."""
    config = read(family, text)
    if family == "block_sparse":
        size = f"{config.block_m}x{config.block_n}"
        form = f" {config.form}" * (config.form != "pointers")
    else:
        size = f"chunk {config.chunk} x {config.block_v}"
        form = f" {config.shares} shares" * (config.shares > 1)
    cap = f" at most {config.registers}" if config.registers else ""
    return f"{size}/{config.num_warps} s{config.num_stages}{form}{cap}"


if __name__ == "__main__":
    sys.exit(main())
