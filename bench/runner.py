"""Runs jobs one after the other, with a progress bar, until they are done or time is up."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bench.compare import Job, Row
from bench.progress import progress_bar


def run_jobs(
    jobs: Iterable[Job], where: Row, *, until: float | None = None, save: Path | None = None
) -> list[Row]:
    """The rows of all jobs, each with the columns of `where`.

    No job starts after `until` (of `time.monotonic`); those left out are named on stderr. What is
    there so far is written to the CSV `save` after each job: a run that is killed loses one.
    """
    jobs, rows, left_out = list(jobs), [], []
    with progress_bar(sum(job.steps for job in jobs), "benchmarks") as bar:
        for job in jobs:
            if until is not None and time.monotonic() > until:
                left_out.append(job.title)
                continue
            bar.set_description(job.title, refresh=False)
            rows += [where | row for row in job.run(bar.update)]
            if save is not None:
                pd.DataFrame(rows).to_csv(save, index=False)
    for title in left_out:
        print("out of time, left out:", title, file=sys.stderr)
    return rows
