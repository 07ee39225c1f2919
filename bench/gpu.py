"""Checks and times on a GPU in one call: `python -m bench.gpu --help`.

First the versions, then the kernels' tests on the device, then checks of every kernel and dtype
against float64, then the timed suites, until the minutes are spent. Where an operator's tests are
red, its times stay out of the report. The CSV, the report and the logs go to one folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.accuracy import accuracy
from bench.compare import Row, Settings
from bench.environment import describe
from bench.features import bias, decode, density
from bench.masks import forms, mask_build, masks, tuned
from bench.nystrom import nystrom
from bench.plot import plot
from bench.report import print_report
from bench.runner import run_jobs
from bench.targets import targets
from flashmark.kernels.block_sparse import configs

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "accuracy": accuracy,
    "masks": masks,
    "nystrom": nystrom,
    "density": density,
    "bias": bias,
    "decode": decode,
    "mask_build": mask_build,
    "tuned": tuned,
    "forms": forms,
}
# by file name of a test, or by suite; forms that no GPU has run are apart, and first: one may hang
OPERATORS = {"forms": "forms", "gluon": "forms", "nystrom": "nystrom", "hybrid": "hybrid"}
FORMS_SECONDS = 60


def main() -> int:
    arguments = parse()
    until = time.monotonic() + 60 * arguments.minutes
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    where = describe(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    red = {}
    pointers = arguments.pointers
    if arguments.tests:
        print(f"tests on {device} ...", flush=True)
        red = run_tests(device, out, arguments.test_minutes or arguments.minutes / 2, pointers)
        print("red:", ", ".join(f"{name} ({why})" for name, why in red.items()) or "none")
        pointers = pointers or "forms" in red
    if pointers:
        print("every kernel takes its pointer form", flush=True)
    settings = Settings(device, arguments.rounds, arguments.quick)
    suites = [SUITES[name] for name in arguments.suites or SUITES]
    jobs = [job for suite in suites for job in suite(settings)]
    with configs.pointer_forms() if pointers else contextlib.nullcontext():
        rows = run_jobs(jobs, where, until=until, save=out / "gpu.csv")
    if not rows:
        print("no time was left for any work")
        return 1
    frame = pd.DataFrame(without_red(rows, red))
    frame.to_csv(out / "gpu.csv", index=False)
    with open(out / "report.txt", "w") as file, contextlib.redirect_stdout(file):
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print("red:", red or "none")
        print_report(frame)
        print("\n" + targets(frame))
    print((out / "report.txt").read_text())
    plot(frame, out / "gpu.csv")
    return int(bool(red) or (frame.status == "wrong").any())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], help="default: all, in order")
    parser.add_argument("--minutes", type=float, default=6, help="no work starts after them")
    parser.add_argument("--rounds", type=int, default=10, help="samples of each contender")
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run?")
    parser.add_argument("--test-minutes", type=float, help="of them for tests, default: half")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="time only")
    parser.add_argument(
        "--pointers", action="store_true", help="without the Hopper forms, as where theirs are red"
    )
    parser.add_argument("--device", default="cuda", help="cpu tries the script where no GPU is")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    return parser.parse_args()


def run_tests(
    device: torch.device, out: Path, minutes: float, pointers: bool = False
) -> dict[str, str]:
    """The kernels' own tests, on the device. Returns the reason for each operator that failed.

    One operator after the other, so that the tests of one that do not finish say nothing of others.
    The Hopper forms come first: where they fail or hang, the others run without them.
    """
    until, red = time.monotonic() + 60 * minutes, {}
    files: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("tests/interpreter/test_*.py")):
        files.setdefault(operator_of(path.name), []).append(str(path))
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with open(out / "tests.log", "w") as log:
        for operator in sorted(files, key=lambda name: name != "forms"):
            junit = out / f"tests-{operator}.xml"
            junit.unlink(missing_ok=True)
            command = [
                sys.executable, "-m", "pytest", "-q", "--tb=short", f"--device={device.type}",
                f"--junitxml={junit}",
            ]  # fmt: skip
            if device.type == "cuda":  # compiling takes longest, and runs on the CPU
                command += ["-n", str(min(16, os.cpu_count() or 1))]
            if operator == "forms" and pointers:
                continue
            if pointers or "forms" in red:
                command.append("--pointers")
            left = until - time.monotonic()
            seconds = min(FORMS_SECONDS, left) if operator == "forms" else left
            if seconds > 0:
                run_limited(
                    command + files[operator], seconds, cwd=ROOT, env=environment, stdout=log,
                    stderr=log,
                )  # fmt: skip
            why = read_verdict(junit)
            if why:
                red[operator] = why
    return red


def run_limited(command: list[str], seconds: float, **options: Any) -> None:
    """Run a command, and end it with its children when its seconds are spent."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def read_verdict(junit: Path) -> str | None:
    """Reason why the tests of a JUnit file failed, None if they passed."""
    if not junit.exists():
        return "its tests did not finish"
    cases = list(ElementTree.parse(junit).iter("testcase"))
    bad = [x for x in cases if x.find("failure") is not None or x.find("error") is not None]
    if not cases:
        return "none of its tests ran"
    return f"{len(bad)} tests failed" if bad else None


def operator_of(name: str) -> str:
    return next((op for part, op in OPERATORS.items() if part in name), "block_sparse")


def without_red(rows: list[Row], red: dict[str, str]) -> list[Row]:
    """Rows without speed-ups of kernels whose tests failed, whatever their own check says."""
    for row in rows:
        why = red.get(operator_of(str(row["suite"])))
        if why and str(row["contender"]).startswith("flashmark") and row["suite"] != "mask_build":
            row |= {"status": "wrong", "reason": f"its tests are red: {why}"}
    return rows


if __name__ == "__main__":
    sys.exit(main())
