"""Pictures of the CSV: bars for one length, curves over several."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402

COLOURS = {
    "flashmark window 512": "#3182bd",
    "flashmark causal": "#08306b",
    "flashmark Nyström M=64": "#31a354",
    "flex causal": "#e6550d",
    "flex window 512": "#fdae6b",
    "flashmark eager": "#9ecae1",
    "flashmark cpu": "#08519c",
    "flashmark triton": "#2171b5",
    "flashmark": "#08519c",
    "flashmark dense": "#3182bd",
    "flashmark choice": "#9ecae1",
    "sdpa causal": "#7f7f7f",
    "sdpa causal cudnn": "#7f7f7f",
    "sdpa causal flash": "#bdbdbd",
    "flex compiled": "#e6550d",
    "create_block_mask": "#e6550d",
}


def plot(frame: pd.DataFrame, csv: Path) -> list[Path]:
    """Draw each suite of a CSV beside it, as `<name>-<suite>.png`: the rows that ran and passed.

    A suite that has its CSV to itself is drawn as `<name>.png`.
    """
    paths = []
    for suite, rows in frame[frame.status == "ok"].groupby("suite", sort=False):
        alone = csv.stem.endswith(f"_{suite}")
        path = csv.with_suffix(".png") if alone else csv.with_name(f"{csv.stem}-{suite}.png")
        (_draw_curves if suite == "curves" else _draw)(rows).savefig(path, dpi=120)
        plt.close("all")
        paths.append(path)
    return paths


def _draw(rows: pd.DataFrame):
    rows = rows.assign(
        kind=rows.get("dtype", pd.Series("", rows.index)).fillna("") + " " + rows.direction
    )
    cases, kinds = rows.case.unique(), rows.kind.unique()
    figure, axes = plt.subplots(
        len(kinds),
        len(cases),
        figsize=(4.6 * len(cases), 2.4 * len(kinds) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for line, kind in zip(axes, kinds, strict=True):
        for ax, case in zip(line, cases, strict=True):
            some = rows[(rows.kind == kind) & (rows.case == case)]
            (_curves if some.n.nunique() > 1 else _bars)(ax, some)
            lengths = f", N={some.n.iloc[0]}" if some.n.nunique() == 1 else ""
            ax.set_title(f"{case}, {kind.strip()}{lengths}", fontsize=9)
            ax.tick_params(labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
    first = rows.iloc[0]
    figure.suptitle(f"{first.machine}, torch {first.torch}, {first.date}", fontsize=9)
    return figure


def _draw_curves(rows: pd.DataFrame):
    """Time above, peak memory below; a column a direction."""
    directions = rows.direction.unique()
    rows = rows.assign(peak_mib=rows.peak_bytes.clip(lower=2**18) / 2**20)
    figure, axes = plt.subplots(
        2,
        len(directions),
        figsize=(5.4 * len(directions), 7),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for column, direction in enumerate(directions):
        some = rows[rows.direction == direction]
        _curves(axes[0, column], some)
        _curves(axes[1, column], some, value="peak_mib", unit="peak MiB")
        axes[0, column].set_title(direction, fontsize=9)
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3, lw=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    first = rows.iloc[0]
    figure.suptitle(
        f"Attention, B{first.batch} H{first.heads} D{first.dim}, {first['dtype']}; "
        f"{first.machine}, torch {first.torch}, {first.date}",
        fontsize=9,
    )
    return figure


def _bars(ax, rows: pd.DataFrame) -> None:
    """Median with the p20..p80 range, peak memory in words."""
    rows = rows.iloc[::-1]
    spread = [rows.p50_ms - rows.p20_ms, rows.p80_ms - rows.p50_ms]
    ax.barh(
        rows.contender,
        rows.p50_ms,
        xerr=spread,
        color=[COLOURS.get(c, "#31a354") for c in rows.contender],
    )
    for place, (ms, high, memory) in enumerate(
        zip(rows.p50_ms, rows.p80_ms, rows.peak_bytes, strict=True)
    ):
        peak = "" if pd.isna(memory) else f", {memory / 2**20:.3g} MiB"
        ax.text(high, place, f"  {ms:.3g} ms{peak}", va="center", fontsize=7)
    ax.set_xlim(0, rows.p80_ms.max() * 1.6)
    ax.set_xlabel("ms", fontsize=8)


def _curves(ax, rows: pd.DataFrame, value: str = "p50_ms", unit: str = "ms") -> None:
    for contender, curve in rows.groupby("contender", sort=False):
        curve = curve.sort_values("n")
        colour = COLOURS.get(contender, "#31a354")
        ax.plot(curve.n, curve[value], "o-", ms=3, lw=1.2, color=colour, label=contender)
        if value == "p50_ms":
            ax.fill_between(curve.n, curve.p20_ms, curve.p80_ms, color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(
        sorted(rows.n.unique()),
        [f"{n // 1024}k" if n >= 1024 else n for n in sorted(rows.n.unique())],
    )
    ax.minorticks_off()
    ax.set_xlabel("N", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)
    ax.legend(fontsize=7, frameon=False)
