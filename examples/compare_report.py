"""Writes the tables and the plot of the comparison: `python -m examples.compare_report [device]`.

They are made from `examples/results/compare-<device>.csv` and `compare-time-<device>.csv`, and put
between the marks in `docs/comparison.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from examples.compare import RESULTS, TOP_K, window_of
from examples.compare_variants import VARIANTS

TOP_K_OF = {"recall 256": 4}  # blocks that a routed attention chooses; 2 in the other tasks
PAGE = Path(__file__).resolve().parents[1] / "docs" / "comparison.md"
START = "<!-- measured: python -m examples.compare_report -->"
END = "<!-- end of measured -->"
TASKS = {  # task -> its column, whether more is better, how it is written
    "text": ("bits", False, "{:.3f}"),
    "recall": ("accuracy", True, "{:.3f}"),
    "recall 256": ("accuracy", True, "{:.3f}"),
}
TITLES = {
    "text": "text: bits a byte",
    "recall": "recall: share right",
    "recall 256": "recall in 256: share right",
}


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    quality = pd.read_csv(RESULTS / f"compare-{device}.csv")
    timing = RESULTS / f"compare-time-{device}.csv"
    timing = pd.read_csv(timing) if timing.exists() else None
    text = "\n\n".join([conditions(quality, timing), table(quality, timing), best_merge(quality)])
    before, _, rest = PAGE.read_text().partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE.name}: expected {START!r} and {END!r}, got none")
    PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")
    plot(quality, timing).savefig(RESULTS / f"compare-{device}.png", dpi=110)


def conditions(quality: pd.DataFrame, timing: pd.DataFrame | None) -> str:
    """Conditions of the comparison: models, machine and date."""
    lines = []
    for task, rows in quality.groupby("task", sort=False):
        row = rows.iloc[0]
        lines.append(
            f"- {task}: context {row.context}, window {row.window}, {row.landmarks} landmarks, "
            f"{row.steps} steps of {row.batch} sequences, width {row.width}, {row.heads} heads, "
            f"2 layers."
        )
    if timing is not None:
        row = timing.iloc[0]
        lines.append(
            f"- time and memory: the attention alone, forward + backward, {row['dtype']}, batch "
            f"{row.batch}, {row.heads} heads of {row.head_dim}, window {row.window}, "
            f"{row.landmarks} landmarks, {TOP_K} blocks of {window_of('routed')} chosen; medians."
        )
    row = quality.iloc[-1]
    lines.append(f"- {row.machine}; torch {row.torch}; {row.date}; revision {row.revision}.")
    return "\n".join(lines)


def table(quality: pd.DataFrame, timing: pd.DataFrame | None) -> str:
    """A line an attention: mean (lowest to highest) over seeds; then time and memory."""
    tasks = [task for task in TASKS if task in set(quality.task)]
    lengths = [] if timing is None else sorted(timing.n.unique())
    head = ["attention", f"reads: {', '.join(tasks)}", *(TITLES[task] for task in tasks), "causal"]
    head += [f"N = {n}: ms, MiB" for n in lengths]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in _present(quality):
        rows = quality[quality.variant == variant]
        cells = [variant, _reads(rows, variant, tasks)]
        cells += [_spread(rows, task) for task in tasks]
        cells.append("yes" if (rows.causal == "yes").all() else "**no**")
        cells += [_cost(timing, variant, n) for n in lengths]
        lines.append("| " + " | ".join(cells) + " |")
    if timing is not None and (timing.variant == "torch").any():
        cells = ["(torch's own exact)", *[""] * (len(tasks) + 2)]
        cells += [_cost(timing, "torch", n) for n in lengths]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = quality.groupby(["task", "variant"]).seed.nunique()
    counts = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    return "\n".join(lines) + f"\n\nMean (lowest to highest) of {counts} seeds."


def _present(quality: pd.DataFrame) -> list[str]:
    return [name for name in VARIANTS if name in set(quality.variant)]


def _reads(rows: pd.DataFrame, variant: str, tasks: list[str]) -> str:
    """Number of keys and slots that a token reads at most in each task."""
    found = []
    for task in tasks:
        here = rows[rows.task == task]
        top_k = TOP_K_OF.get(task, 2)
        found.append("" if here.empty else str(VARIANTS[variant].reads(
            int(here.context.iloc[0]), int(here.window.iloc[0]), int(here.landmarks.iloc[0]), top_k
        )))  # fmt: skip
    return ", ".join(x or "-" for x in found)


def _spread(rows: pd.DataFrame, task: str) -> str:
    column, _, form = TASKS[task]
    scores = rows[rows.task == task][column]
    if scores.empty:
        return ""
    if len(scores) == 1:
        return f"{form.format(scores.iloc[0])} (one seed)"
    low, high = (form.format(x) for x in (scores.min(), scores.max()))
    return f"{form.format(scores.mean())} ({low} to {high})"


def _cost(timing: pd.DataFrame, variant: str, n: int) -> str:
    row = timing[(timing.variant == variant) & (timing.n == n)]
    if row.empty:
        return ""
    row = row.iloc[-1]
    text = f"{row.p50_ms:.3g}" if row.p50_ms < 1000 else f"{row.p50_ms:.0f}"
    return text if pd.isna(row.peak_bytes) else f"{text}, {row.peak_bytes / 2**20:.0f}"


def best_merge(quality: pd.DataFrame) -> str:
    """Ranks of the hybrids among each other on each task, by mean over seeds."""
    hybrids = quality[quality.variant.str.startswith("hybrid")]
    lines = []
    for task, (column, more, form) in TASKS.items():
        means = hybrids[hybrids.task == task].groupby("variant")[column].mean()
        if not means.empty:
            ranked = means.sort_values(ascending=not more)
            shown = ", ".join(f"{name} {form.format(mean)}" for name, mean in ranked.items())
            lines.append(f"Hybrids on {task}, best first: {shown}.")
    return "\n".join(lines)


def plot(quality: pd.DataFrame, timing: pd.DataFrame | None):
    """A panel a task with a dot a seed (a cross where it leaks), then time and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = _present(quality)
    tasks = [task for task in TASKS if task in set(quality.task)]
    panels = len(tasks) + 2 * (timing is not None)
    figure, axes = plt.subplots(1, panels, figsize=(1.5 + 3 * panels, 3.6), sharey=True)
    for axis, task in zip(axes, tasks, strict=False):
        column, more, _ = TASKS[task]
        for n, name in enumerate(variants):
            rows = quality[(quality.task == task) & (quality.variant == name)]
            marker = "o" if (rows.causal == "yes").all() else "x"
            axis.plot(rows[column], [n] * len(rows), marker, color=f"C{n % 10}", alpha=0.8)
        axis.set_xlabel(f"{TITLES[task]} ({'more' if more else 'less'} is better)")
    if timing is not None:
        longest = timing[timing.n == timing.n.max()].drop_duplicates("variant", keep="last")
        costs = longest.set_index("variant").reindex(variants)
        for axis, values, label in (
            (axes[-2], costs.p50_ms, f"ms at N = {timing.n.max()}"),
            (axes[-1], costs.peak_bytes / 2**20, "peak MiB"),
        ):
            axis.barh(range(len(variants)), values, color=[f"C{n % 10}" for n in range(20)])
            axis.set_xlabel(label)
    axes[0].set_yticks(range(len(variants)), variants)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
