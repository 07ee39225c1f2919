"""Time and memory of callables, side by side in one process."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Run = Callable[[], object]
AHEAD = 2_000_000  # cycles, about a millisecond: more than Python needs for a few launches


class Spread(NamedTuple):
    """Percentiles of the samples, in milliseconds."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(seconds: list[float]) -> Spread:
        if len(seconds) == 1:
            return Spread(*[seconds[0] * 1e3] * 3)
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return Spread(cuts[1] * 1e3, cuts[4] * 1e3, cuts[7] * 1e3)


def interleaved(
    runs: dict[str, Run],
    device: torch.device,
    *,
    rounds: int,
    sample: float = 0.02,
    budget: float = math.inf,
    each: Callable[[], object] = lambda: None,
    ahead: bool = False,
) -> dict[str, Spread]:
    """Warm every run, then take one sample of each per round, in an order that rotates.

    A machine that slows down for a while slows all of them. A run shorter than `sample` seconds is
    repeated inside its sample. No round starts once `budget` seconds are spent, the first excepted.
    `each` is called after every sample. `ahead` keeps a GPU busy while a run is launched, so that
    the time is the kernels' and not Python's.
    """
    on_gpu = functools.partial(_cuda_clock, ahead=ahead)
    clock = on_gpu if device.type == "cuda" else _cpu_clock
    repeats, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        cold = clock(run, 1)
        warm = cold if cold > 4 * sample else clock(run, 1)
        repeats[name] = max(1, math.ceil(sample / max(warm, 1e-6)))
    names, start_of_rounds = list(runs), time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - start_of_rounds > budget:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(clock(runs[name], repeats[name]))
            each()
    return {name: Spread.of(samples) for name, samples in times.items()}


def _cpu_clock(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _cuda_clock(run: Run, repeats: int, ahead: bool) -> float:
    """Seconds a run on the GPU, its L2 cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        if ahead:
            torch.cuda._sleep(AHEAD)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a warm run needs at its peak beyond what was there before: results and workspaces.

    On a GPU the caching allocator's count. On Linux the kernel's own high-water mark of resident
    memory, which also sees what C++ code allocates by itself, good to about a megabyte. None where
    neither can be had.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed pages go back, or the run would re-use them unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from here
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
