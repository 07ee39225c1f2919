"""The Nyström kernels compile, fit, and use the tensor cores; what may spill, and how much."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import triton

from bench.offline import SHARED_MEMORY, Report, compiling_for, inspect, parse_target
from flashmark.kernels.nystrom import configs
from tests.compile import budgets
from tests.compile.nystrom_launches import HALF, SINGLE, Launch, all_launches

ASKED = os.environ.get("FLASHMARK_COMPILE_TARGETS")
TARGETS = (ASKED or "sm_90").split(",")
HALF2 = torch.float16
SUITE = [  # a launch for every config
    *(Launch("forward", m, d) for m, d in ((32, 32), (64, 64), (64, 128), (128, 32), (128, 128))),
    *(Launch("forward", m, 256) for m in (64, 128)),
    *(Launch("backward", m, d) for m, d in ((32, 32), (64, 64), (64, 128), (128, 128))),
    Launch("backward", 32, 32, dtype=HALF2),
    *(Launch("decode", m, m) for m in (64, 128)),
    *(Launch("bidirectional", m, m) for m in (64, 128)),
    *(Launch("forward", m, d, dtype=HALF2) for m, d in ((64, 64), (64, 128), (128, 128))),
    *(Launch(p, 32, 32, dtype=SINGLE) for p in ("forward", "backward")),
]
STANDING = [  # for their siblings, which are compiled where targets are named: up to a minute each
    *(Launch("forward", m, m) for m in (64, 128)),
    *(Launch(p, 64, 64) for p in ("backward", "decode", "bidirectional")),
    *(Launch("backward", 64, 64, feature) for feature in ("decay", "grouped")),
    Launch("forward", 32, 32, dtype=SINGLE),
]
NEW_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
# bytes that all kernels of a call spilled when a program of the backward walked a whole stretch and
# kept states in scratch memory, Triton 3.7.1 and 3.6.0 on sm_90
SPILLED_BEFORE = {
    "forward-bf16-M64-D32-plain": (240, 240),
    "forward-bf16-M64-D64-plain": (24, 16),
    "forward-bf16-M64-D128-plain": (96, 8),
    "forward-bf16-M64-D64-mass": (176, 144),
    "forward-bf16-M64-D64-decay": (96, 72),
    "forward-bf16-M64-D64-grouped": (24, 40),
    "forward-bf16-M64-D64-packed": (24, 24),
    "backward-bf16-M32-D32-plain": (240, 184),
    "backward-bf16-M32-D64-plain": (272, 272),
    "backward-bf16-M32-D128-plain": (816, 792),
    "backward-bf16-M64-D32-plain": (464, 128),
    "backward-bf16-M64-D64-plain": (1512, 1096),
    "backward-bf16-M64-D128-plain": (2304, 1912),
    "backward-bf16-M128-D32-plain": (1952, 1096),
    "backward-bf16-M128-D64-plain": (3728, 2912),
    "backward-bf16-M128-D128-plain": (4736, 3896),
    "backward-bf16-M64-D64-mass": (1744, 1328),
    "backward-bf16-M64-D64-decay": (1856, 1456),
    "backward-bf16-M64-D64-grouped": (744, 528),
    "backward-bf16-M64-D64-packed": (1480, 1072),
}
SCANS = ("scan_kernel", "reverse_scan_kernel", "join_slots_kernel")  # sums only
CUT = ("output_kernel", "rows_kernel", "keys_kernel")  # launched for chunks, then for pieces


def roles(reports: list[Report], decode: bool) -> list[tuple[Report, bool]]:
    """Each report, and whether it is of a launch for pieces."""
    marked, turns = [], dict.fromkeys(CUT, decode)
    for report in reports:
        pieces = turns.get(report.kernel, False)
        marked.append((report, pieces))
        if report.kernel in turns and not decode:
            turns[report.kernel] = not pieces
    return marked


def spill_allowed(launch: Launch, report: Report, pieces: bool) -> int:
    """Bytes to a thread. Pieces run where a chunk is cut, which is seldom."""
    if pieces:
        return 384
    slack = 0 if NEW_TRITON else 64
    if launch.dtype == SINGLE:
        return slack + 576
    if report.kernel not in CUT:
        return slack + (16 if report.kernel == "read_backward_kernel" else 0)
    if launch.dtype == HALF2:
        return slack + (64 if report.kernel == "output_kernel" else 640)
    if launch.feature != "plain":
        return slack + (24 if report.kernel == "output_kernel" else 272)
    wide = max(launch.marks, launch.dim, launch.v_dim) > 64
    most = {"output_kernel": (24, 96), "rows_kernel": (272, 320), "keys_kernel": (96, 512)}
    return slack + most[report.kernel][wide]


def test_the_suite_has_a_launch_for_every_config():
    """All that a width changes in a config is here; columns follow the widths themselves.

    But for reads in float16 and float32, which all launches have.
    """

    def fields(config):
        return config.chunk, config.num_warps, config.num_stages, config.shares

    choose = configs.choose
    wanted = {
        (pass_, fields(choose(90, pass_, dtype, m, d, d, tokens)))
        for pass_ in configs.PASSES
        for dtype in ((HALF,) if pass_ == "read" else (HALF, HALF2, SINGLE))
        for m, d in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256))
        for tokens in ((1,) if pass_ == "decode" else (4096,))
    }
    reached = set()

    def noting(arch, pass_, *rest):
        config = choose(arch, pass_, *rest)
        reached.add((pass_, fields(config)))
        return config

    with compiling_for(90), pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "choose", noting)
        patch.setattr("triton.runtime.jit.JITFunction.run", lambda *args, **kwargs: None)
        for launch in SUITE:
            launch.run()
    assert wanted <= reached, wanted - reached


@pytest.mark.skipif(not ASKED, reason="`make compile-all` compiles the widest")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "launch",
    [Launch(p, 128, 256, dtype=t) for p in ("forward", "backward") for t in (HALF, HALF2)],
    ids=str,
)
def test_the_widest_kernels_find_their_shared_memory(launch, arch):
    with compiling_for(arch) as launches:
        launch.run()
    for name, kernel in launches:
        assert kernel.metadata.shared <= SHARED_MEMORY[arch], name


def test_one_process_compiles_for_several_targets():
    found = {}
    for arch in (90, 80, 90):
        with compiling_for(arch) as launches:
            Launch("decode", 64, 64).run()
        found[arch] = inspect(*launches[0]).hgmma
    assert found[90] > 0 and found[80] == 0


@pytest.mark.parametrize(
    "pairs, tokens, span", [(8, 4096, 128), (16, 16384, 1024), (8, 65536, 2048), (1, 1 << 20, 2048)]
)
def test_sequences_are_cut_into_as_few_stretches_as_keep_the_device_busy(pairs, tokens, span):
    with compiling_for(90):
        assert configs.forward_span(torch.device("cpu"), pairs, tokens) == span


@pytest.mark.parametrize(
    "launch", dict.fromkeys([*SUITE, *all_launches()]) if ASKED else STANDING, ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel(target, launch):
    arch = parse_target(target)
    with compiling_for(arch) as launches:
        launch.run()
    reports = [inspect(*each) for each in launches]
    assert reports
    if arch == 90:
        for name, kernel in budgets.distinct(launches):
            assert budgets.complaints(str(launch), name, kernel) == [], name
        if before := SPILLED_BEFORE.get(str(launch)):
            assert sum(each.spilled for each in set(reports)) <= before[not NEW_TRITON]
    for report, pieces in roles(reports, launch.pass_ == "decode"):
        assert report.shared <= SHARED_MEMORY[arch], report
        if arch != 90:
            continue
        assert report.spilled <= spill_allowed(launch, report, pieces), report
        if launch.dtype != SINGLE and report.kernel not in SCANS:
            assert report.hgmma + report.hmma > 0, report
        if launch.dtype == HALF and launch.marks >= 64 and launch.pass_ != "decode":
            rows32 = report.kernel == "read_kernel" and launch.marks > 64  # half a warpgroup's
            assert report.hgmma > 0 or report.kernel in SCANS or rows32, report
