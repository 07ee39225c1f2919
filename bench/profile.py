"""Nsight Compute and the compute sanitizer over this package's kernels, where there is a GPU.

    python -m bench.profile ncu                  two forward and two backward kernels, as a table
    python -m bench.profile sanitizer            memcheck, then racecheck, of the smallest tests
    python -m bench.profile run causal-forward   what is profiled, by itself

Clocks are left as they are. The exit code is 2 where a tool or a GPU is missing.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import flashmark
from bench.patterns import PATTERNS
from bench.peers import Work

ROOT = Path(__file__).resolve().parents[1]
MISSING = 2
N, HEADS, DIM = 8192, 16, 128
# name: (pattern, with its backward, the kernel that is profiled)
WORKS = {
    "causal-forward": ("causal", False, "^forward"),
    "window-forward": ("window", False, "^forward"),
    "causal-backward": ("causal", True, "^backward_kv"),
    "window-backward": ("window", True, "^backward_q"),
}
STALL = "smsp__average_warps_issue_stalled_"
# metric: (heading of its column, how it is shown)
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "gpu__time_duration.sum": ("ms", lambda ns: f"{ns / 1e6:.3g}"),
    "launch__registers_per_thread": ("registers", lambda count: f"{count:.0f}"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy", lambda x: f"{x:.0f} %"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": (
        "tensor pipe", lambda x: f"{x:.0f} %",
    ),
    "l1tex__throughput.avg.pct_of_peak_sustained_active": ("L1", lambda x: f"{x:.0f} %"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("L2", lambda x: f"{x:.0f} %"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("memory", lambda x: f"{x:.0f} %"),
}  # fmt: skip
STALLS = rf"regex:^{STALL}.*_per_issue_active\.ratio$"
TO_NANOSECONDS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}
SMALLEST = "test_lengths or test_dtypes or test_bias_gradient or test_gradients_repeat"


class Missing(Exception):
    """A tool or a GPU is not there; the message says which."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["ncu", "sanitizer", "run"])
    parser.add_argument("work", nargs="?", choices=[None, *WORKS], help="for run")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    arguments = parser.parse_args()
    try:
        if arguments.what == "run":
            run(arguments.work or parser.error("run: expected a work"))
            return 0
        arguments.out.mkdir(parents=True, exist_ok=True)
        return {"ncu": ncu, "sanitizer": sanitizer}[arguments.what](arguments.out)
    except Missing as reason:
        print(reason, file=sys.stderr)
        return MISSING


def find(tool: str) -> str:
    path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
    if path is None:
        raise Missing(f"{tool}: not installed (it comes with the CUDA toolkit)")
    if not torch.cuda.is_available():
        raise Missing(f"{tool}: found, but there is no GPU to run on")
    return path


def run(name: str) -> None:
    """Launch the kernels of a work once."""
    if not torch.cuda.is_available():
        raise Missing(f"{name}: there is no GPU to run on")
    pattern, backward, _ = WORKS[name]
    device = torch.device("cuda")
    work = Work(PATTERNS[pattern](N, device), 1, HEADS, N, DIM, torch.bfloat16, device, backward)
    inputs = work.inputs()
    mask = flashmark.compile_mask(work.pattern.mask, 1, 1, N, N, device=device)
    out = flashmark.block_sparse_attention(*inputs, mask, backend="triton", deterministic=True)
    if backward:
        torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()


def ncu_command(tool: str, name: str) -> list[str]:
    return [
        tool, "--clock-control", "none", "--csv", "--launch-count", "1",
        "--kernel-name", f"regex:{WORKS[name][2]}", "--metrics", ",".join([*COLUMNS, STALLS]),
        sys.executable, "-m", "bench.profile", "run", name,
    ]  # fmt: skip


def ncu(out: Path) -> int:
    """Profile each work; the CSV of each goes to `out`, a line of each is printed."""
    tool, lines = find("ncu"), []
    for name in WORKS:
        print(f"profiling {name} ...", file=sys.stderr, flush=True)
        done = subprocess.run(ncu_command(tool, name), cwd=ROOT, capture_output=True, text=True)
        (out / f"ncu-{name}.csv").write_text(done.stdout)
        kernels = parse_ncu(done.stdout)
        if not kernels:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
            return 1
        lines += [(name, kernel, metrics) for kernel, metrics in kernels]
    print(table(lines))
    return 0


def parse_ncu(text: str) -> list[tuple[str, dict[str, float]]]:
    """[(kernel, {metric: value})] of what `ncu --csv` prints; durations in nanoseconds."""
    lines = text.splitlines()
    head = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[tuple[str, str], dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[head:]))):
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except (ValueError, AttributeError):  # "n/a", or a line of the profiled program
            continue
        value *= TO_NANOSECONDS.get(row["Metric Unit"], 1)
        kernels.setdefault((row["ID"], row["Kernel Name"]), {})[row["Metric Name"]] = value
    return [(kernel, metrics) for (_, kernel), metrics in kernels.items()]


def stalls(metrics: dict[str, float], most: int = 3) -> str:
    """What warps wait for, the longest first, in waiting warps to an issued instruction."""
    found = {
        name.removeprefix(STALL).split("_per_issue")[0]: value
        for name, value in metrics.items()
        if name.startswith(STALL) and "not_issued" not in name
    }
    found.pop("selected", None)  # that one does not wait
    top = sorted(found, key=found.__getitem__, reverse=True)[:most]
    return ", ".join(f"{name.replace('_', ' ')} {found[name]:.1f}" for name in top)


def table(lines: list[tuple[str, str, dict[str, float]]]) -> str:
    """Markdown: a line a kernel."""
    heads = ["work", "kernel", *(head for head, _ in COLUMNS.values()), "stalls"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, kernel, metrics in lines:
        cells = [
            shown(metrics[metric]) if metric in metrics else "-"
            for metric, (_, shown) in COLUMNS.items()
        ]
        rows.append("| " + " | ".join([name, kernel, *cells, stalls(metrics)]) + " |")
    return "\n".join(rows)


def sanitizer_command(tool: str, check: str) -> list[str]:
    return [
        tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all",
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda",
        "-k", SMALLEST, "tests/interpreter",
    ]  # fmt: skip


def sanitizer(out: Path) -> int:
    """The exit code is 1 where a check found something or a test failed."""
    tool, found = find("compute-sanitizer"), 0
    # every tensor its own allocation: beside it is nobody's memory
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    for check in ("memcheck", "racecheck"):
        log = out / f"{check}.log"
        with open(log, "w") as file:
            done = subprocess.run(
                sanitizer_command(tool, check), cwd=ROOT, env=environment, stdout=file, stderr=file
            )
        summary = [x for x in log.read_text().splitlines() if "SUMMARY" in x or " passed" in x]
        print(f"{check}: exit code {done.returncode}; {'; '.join(summary[-2:])} ({log})")
        found |= done.returncode
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
