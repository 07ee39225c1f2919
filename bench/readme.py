"""Writes the table of a CSV into the README: `python -m bench.readme [csv]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from bench.report import KEYS, title

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- measured: python -m bench.readme -->", "<!-- end of measured -->"
YARDSTICKS = ("sdpa causal", "create_block_mask")
SUITES = ("masks", "mask_build", "nystrom")  # what a reader of the README asks for


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
    text = f"{row.p50_ms:.3g}" if row.p50_ms < 1000 else f"{row.p50_ms:.0f}"
    if pd.notna(yardstick) and not row.contender.startswith(YARDSTICKS):
        text += f" ({yardstick / row.p50_ms:.1f}x)"
    return text if pd.isna(row.peak_bytes) else f"{text}, {row.peak_bytes / 2**20:.0f} MiB"


def main() -> None:
    csv = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "cpu.csv"
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md: expected {START!r} and {END!r}, got none")
    readme.write_text(f"{before}{START}\n\n{table(pd.read_csv(csv))}\n\n{END}{after}")


if __name__ == "__main__":
    main()
