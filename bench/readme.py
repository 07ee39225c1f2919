"""Writes a CSV and the routed suite's beside it into the README, five rows of them, and into
docs/performance.md, all of them; and that of forward mode into docs/derivatives.md: `python -m
bench.readme [csv]`.
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


def forward_mode(frame: pd.DataFrame) -> str:
    """Markdown: milliseconds of a forward, and with tangents; a line a work."""
    first = frame.iloc[0]
    lines = [
        "| | forward | with tangents of all three | of the query alone | PyTorch, of all three |",
        "|---|---|---|---|---|",
    ]
    for (case, n, dtype), work in frame.groupby(["case", "n", "dtype"], sort=False):
        times = work[work.status == "ok"].set_index("contender").p50_ms
        cells = [_ms(times["forward"])]
        for name in ("jvp", "jvp of the query", "PyTorch's jvp"):
            known = name in times
            cells.append(
                f"{_ms(times[name])} ({times[name] / times['forward']:.1f}x)" if known else ""
            )
        lines.append(f"| {case}, N={n}, {dtype} | " + " | ".join(cells) + " |")
    where = f"{first.machine}; {first.threads} threads; torch {first.torch}; {first.date}; "
    return (
        f"{where}revision {first.revision}. Median milliseconds, 8 heads, D = 64, (times the "
        "forward's).\n\n" + "\n".join(lines)
    )


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
    tangents = pd.read_csv(csv.with_name(f"{csv.stem}_derivatives{csv.suffix}"))
    pages = {
        "README.md": headlines(frame),
        "docs/performance.md": table(frame),
        "docs/derivatives.md": forward_mode(tangents),
    }
    for name, text in pages.items():
        page = ROOT / name
        before, _, rest = page.read_text().partition(START)
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"{name}: expected {START!r} and {END!r}, got none")
        page.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
