"""Writes a CSV and the routed suite's beside it into the README, five rows of them, and into
docs/performance.md, all of them: `python -m bench.readme [csv]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from bench.report import KEYS, title

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- measured: python -m bench.readme -->", "<!-- end of measured -->"
YARDSTICKS = ("sdpa causal", "create_block_mask")
SUITES = ("masks", "mask_build", "nystrom", "routed")
ROUTED = "routed, 4 landmarks, 16 of 64"
HEADLINES = (  # (case, tokens, dtype, direction) of the README's rows, and their contenders
    (("causal", 8192, "bfloat16", "forward+backward"), "flashmark cpu", "sdpa causal"),
    (("window 512", 8192, "float32", "forward+backward"), "flashmark cpu", "sdpa causal"),
    (("Nyström M=64", 16384, "float32", "forward+backward"), "flashmark cpu", "sdpa causal"),
    ((ROUTED, 65536, "float32", "forward"), "flashmark cpu", "sdpa causal"),
    (("window 512", 8192, None, "build"), "flashmark", "create_block_mask"),
)


def measurements(csv: Path) -> pd.DataFrame:
    """The rows of a CSV and those of the routed suite beside it, a suite with a CSV of its own."""
    beside = csv.with_name(f"{csv.stem}_routed{csv.suffix}")
    return pd.concat(pd.read_csv(path) for path in (csv, beside) if path.exists())


def headlines(frame: pd.DataFrame) -> str:
    """Markdown: four works, ours and PyTorch's milliseconds, and their ratio."""
    first = frame.iloc[0]
    lines = ["| | flashmark, ms | PyTorch, ms | |", "|---|---|---|---|"]
    for (case, n, dtype, direction), ours, theirs in HEADLINES:
        work = frame[(frame.case == case) & (frame.n == n) & (frame.direction == direction)]
        work = work[(work.dtype == dtype) if dtype else work.dtype.isna()]
        times = work[work.status == "ok"].set_index("contender").p50_ms
        label = ", ".join(x for x in (case, f"N={n}", dtype, direction) if x)
        peer = "`create_block_mask`" if direction == "build" else "SDPA, causal"
        ratio = times[theirs] / times[ours]
        lines.append(
            f"| {label} | {_ms(times[ours])} | {_ms(times[theirs])} ({peer}) | {ratio:.3g}x |"
        )
    where = f"{first.machine}; torch {first.torch}; {first.date}; median of one run."
    return "\n".join(lines) + f"\n\n{where}"


def table(frame: pd.DataFrame) -> str:
    """Markdown: a line a work, a column a contender, "ms (times faster than PyTorch's), MiB"."""
    ran = frame[(frame.status == "ok") & frame.suite.isin(SUITES)]
    keys = [key for key in KEYS if key in ran]
    first, parts = ran.iloc[0], []
    parts.append(
        f"{first.machine}; {first.threads} threads; torch {first.torch}; {first.date}; revision "
        f"{first.revision}. Median milliseconds, (times faster than PyTorch's), peak memory."
    )
    for _, suite in ran.groupby("suite", sort=False):
        names = list(suite.contender.unique())
        parts.append("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
        for values, work in suite.groupby(keys, sort=False, dropna=False):
            yardstick = work[work.contender.str.startswith(YARDSTICKS)].p50_ms.min()
            cells = {row.contender: _cell(row, yardstick) for row in work.itertuples()}
            label = title(dict(zip(keys, values, strict=True)))
            parts[-1] += f"\n| {label} | " + " | ".join(cells.get(n, "") for n in names) + " |"
    return "\n\n".join(parts)


def _cell(row, yardstick: float) -> str:
    text = _ms(row.p50_ms)
    if pd.notna(yardstick) and not row.contender.startswith(YARDSTICKS):
        text += f" ({yardstick / row.p50_ms:.1f}x)"
    return text if pd.isna(row.peak_bytes) else f"{text}, {row.peak_bytes / 2**20:.0f} MiB"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    csv = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "cpu.csv"
    frame = measurements(csv)
    for name, text in (("README.md", headlines(frame)), ("docs/performance.md", table(frame))):
        page = ROOT / name
        before, _, rest = page.read_text().partition(START)
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"{name}: expected {START!r} and {END!r}, got none")
        page.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
