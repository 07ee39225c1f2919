"""The CSV as a table: times with spread, memory, and ratios to the peers of the same run."""

from __future__ import annotations

import math

import pandas as pd

KEYS = ["suite", "case", "n", "dim", "dtype", "direction"]
PEERS = ("sdpa", "flex", "flash-sparse-attn", "create_block_mask", "pytorch")


def print_report(frame: pd.DataFrame) -> None:
    """One block per work. Where a contender was wrong or did not run, its reason and no number."""
    keys = [key for key in KEYS if key in frame]
    for values, group in frame.groupby(keys, sort=False, dropna=False):
        labels = dict(zip(keys, values, strict=True))
        print("\n" + title(labels))
        peers = {peer: _fastest(group, peer) for peer in PEERS}
        peers = {peer: ms for peer, ms in peers.items() if not math.isnan(ms)}
        head = f"  {'':<20}{'ms':>9}  {'p20..p80':<17}{'peak MiB':>9}{'error':>10}"
        print(head + "".join(f"{'x ' + peer:>21}" for peer in peers))
        for row in group.to_dict("records"):
            print("  " + _line(row, peers))


def title(labels: dict) -> str:
    parts = [labels["case"], f"N={labels['n']}"]
    if isinstance(labels.get("dtype"), str):
        parts += [f"D={labels['dim']:.0f}", labels["dtype"]]
    return ", ".join([*parts, labels["direction"]])


def _fastest(group: pd.DataFrame, peer: str) -> float:
    ran = group[group.contender.str.startswith(peer) & (group.status == "ok")]
    return ran.p50_ms.min() if len(ran) else math.nan


def _line(row: dict, peers: dict[str, float]) -> str:
    name = f"{row['contender']:<20}"
    if row["status"] != "ok":
        return f"{name}{'WRONG' if row['status'] == 'wrong' else '-':>9}  {row['reason']}"
    spread = f"{row['p20_ms']:.3g}..{row['p80_ms']:.3g}"
    memory, error = row.get("peak_bytes", math.nan), row.get("error", math.nan)
    line = f"{name}{row['p50_ms']:>9.4g}  {spread:<17}"
    line += f"{memory / 2**20:>9.1f}" if not math.isnan(memory) else f"{'':>9}"
    line += f"{error:>10.1e}" if not math.isnan(error) else f"{'':>10}"
    return line + "".join(f"{ms / row['p50_ms']:>20.2f}x" for ms in peers.values())
