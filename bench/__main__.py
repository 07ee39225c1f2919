"""Run the benchmarks: `python -m bench --help`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pandas as pd
import torch

from bench.compare import Settings
from bench.curves import curves
from bench.derivatives import derivatives
from bench.environment import describe
from bench.masks import mask_build, masks
from bench.native import native
from bench.nystrom import nystrom
from bench.plot import plot
from bench.report import print_report
from bench.routed import routed
from bench.runner import run_jobs

SUITES = {"masks": masks, "mask_build": mask_build, "nystrom": nystrom, "native": native}
ALONE = {
    "curves": curves,
    "derivatives": derivatives,
    "routed": routed,
}  # by name only, and into a CSV of their own
RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = Settings(
        device=device,
        rounds=arguments.rounds or (3 if arguments.quick else 10),
        quick=arguments.quick,
        patterns=tuple(arguments.patterns),
        lengths=tuple(arguments.lengths),
        dtypes=tuple(DTYPES[name] for name in arguments.dtypes),
    )
    suites = [(SUITES | ALONE)[name] for name in arguments.suites or SUITES]
    jobs = [job for suite in suites for job in suite(settings)]
    where = describe(device)
    frame = pd.DataFrame(run_jobs(jobs, where))

    name = "_".join([slug(where), *(suite for suite in arguments.suites if suite in ALONE)])
    csv = arguments.out or RESULTS / f"{name}{'-quick' if arguments.quick else ''}.csv"
    csv.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(csv, index=False)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print_report(frame)
    print("\nwrote", ", ".join(str(path) for path in [csv, *plot(pd.read_csv(csv), csv)]))
    return int((frame.status == "wrong").any())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="suite",
        help=f"of {', '.join(SUITES)} (default: these); or {', '.join(ALONE)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="short lengths, few rounds: does it run?"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, help="samples of each contender (default 10)")
    parser.add_argument(
        "--patterns", nargs="+", default=[], help="masks, by name in bench/patterns.py"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[], help="sequence lengths")
    parser.add_argument("--dtypes", nargs="+", default=[], choices=DTYPES)
    parser.add_argument("--out", type=Path, help="CSV (default bench/results/<device>.csv)")
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - set(SUITES) - set(ALONE)
    if unknown:
        known = ", ".join(SUITES | ALONE)
        parser.error(f"suite: expected some of {known}, got {', '.join(unknown)}")
    if len(arguments.suites) > 1 and set(arguments.suites) & set(ALONE):
        parser.error(f"suite: expected {', '.join(ALONE)} alone, got {', '.join(arguments.suites)}")
    return arguments


def slug(where: dict) -> str:
    """A file name for the device: "cpu", "nvidia-h200"."""
    if where["device"] == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", str(where["machine"]).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
