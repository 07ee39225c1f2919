"""A progress bar that leaves a short log where there is no terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str = "step") -> tqdm:
    """A bar on a terminal; elsewhere a line for every tenth of the way."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, unit=unit)
    return tqdm(
        total=total,
        desc=description,
        bar_format="{desc}: {n_fmt} of {total_fmt} " + unit + "s, {elapsed}{postfix}\n",
        miniters=max(1, total // 10),
        mininterval=0,
        maxinterval=float("inf"),
    )
