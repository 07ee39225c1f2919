"""The hybrid kernels compile, fit, and use the tensor cores; the light ones do not spill."""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest
import torch

from bench.offline import SHARED_MEMORY, compiling_for, inspect, parse_target
from flashmark import HybridState
from flashmark.hybrid.call import Call
from flashmark.hybrid.state import tensors_of
from flashmark.kernels import hybrid
from flashmark.kernels.hybrid import mass
from tests.compile import budgets

ASKED = os.environ.get("FLASHMARK_COMPILE_TARGETS")
TARGETS = (ASKED or "sm_90").split(",")
HALF, SINGLE = torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True)
class Launch:
    """Both directions of one call: what slots hold, or how the mass is read."""

    marks: int
    dim: int
    kind: str = "slots"  # or "masked" slots, "mass"
    dtype: torch.dtype = HALF

    def __str__(self) -> str:
        dtype = {HALF: "bf16", SINGLE: "fp32"}.get(self.dtype, "fp16")
        return f"{self.kind}-{dtype}-M{self.marks}-D{self.dim}"

    def run(self) -> None:
        """Call the launchers on CPU tensors."""
        key = torch.zeros(1, 4, 8, 256, self.dim, dtype=self.dtype)
        landmarks = torch.zeros(4, self.marks, self.dim)
        if self.kind == "mass":
            L = torch.zeros(1, 4, 8, self.marks)
            R = torch.zeros(*L.shape, self.dim)
            call = key, landmarks, torch.zeros(4, self.marks, self.marks), L, R, 0.125
            numerator, read, _ = mass.forward(*call)
            mass.backward(numerator, read, *call)
            return
        keep = torch.ones(1, 8, 256, dtype=torch.bool) if self.kind == "masked" else None
        call = key, key, landmarks, keep, 0.125
        sums = hybrid.sums_forward(*call)
        hybrid.sums_backward(*sums, *call)


WIDTHS = (32, 64, 128)
ALL = [
    *(Launch(m, d, k) for m, d in itertools.product(WIDTHS, WIDTHS) for k in ("slots", "mass")),
    Launch(64, 256),
    Launch(64, 64, "masked"),
    Launch(64, 128, "masked"),
    *(Launch(64, 64, k, torch.float16) for k in ("slots", "mass")),
    *(Launch(m, m, k, SINGLE) for m in (64, 128) for k in ("slots", "mass")),
]
SUITE = [
    Launch(64, 64),
    Launch(64, 128, "masked"),
    Launch(128, 128),
    Launch(64, 64, dtype=SINGLE),
    Launch(64, 64, "mass"),
    Launch(128, 128, "mass"),
]
STANDING = [Launch(64, 64), Launch(64, 128, "masked"), Launch(128, 128, "mass")]  # for the others


@pytest.mark.parametrize(
    "launch", ALL if len(TARGETS) > 1 else SUITE if ASKED else STANDING, ids=str
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
    for report in reports:
        assert report.shared <= SHARED_MEMORY[arch], report
        if arch == 90:
            assert max(launch.marks, launch.dim) > 64 or report.spilled == 0, report
            if launch.dtype != SINGLE:
                assert report.hgmma + report.hmma > 0, report


def step(merge: str, dtype: torch.dtype, width: int) -> None:
    """Launch a decoding step of `width` landmarks and dimensions on CPU tensors."""
    state = HybridState.empty(2, 2, width, width, window=128, merge=merge, dtype=dtype)
    held, marks = tensors_of(state), torch.zeros(2, width, width)
    core = None if merge == "slots" else torch.zeros(2, width, width)
    held = held if merge == "slots" else (*held[:5], None, held[5])
    query, key = (torch.zeros(2, heads, 1, width, dtype=dtype) for heads in (4, 2))
    gate = torch.zeros(2, 4, 1, 1) if merge == "gate" else None
    call = Call(
        query, key, key, marks, marks, 128, merge, 0.125, core, gate, None, None, *held, True
    )
    hybrid.step(call, torch.ones(2, dtype=torch.bool))


DTYPES = {"bf16": HALF, "fp16": torch.float16, "fp32": SINGLE}
STEPS = list(itertools.product(("slots", "mass", "gate"), DTYPES, (64, 128)))
STANDING_STEPS = [
    ("slots", "bf16", 128), ("mass", "fp16", 64), ("gate", "bf16", 64), ("slots", "fp32", 128)
]  # fmt: skip


@pytest.mark.parametrize(("merge", "dtype", "width"), STEPS if ASKED else STANDING_STEPS)
def test_a_decoding_step(merge, dtype, width):
    dtype = DTYPES[dtype]
    with compiling_for(90) as launches:
        step(merge, dtype, width)
    reports = [inspect(*each) for each in launches]
    assert [report.kernel for report in reports] == ["step_kernel", "advance_kernel"]
    for report in reports:
        assert report.shared <= SHARED_MEMORY[90] // 2, report
        # exact float32 products keep their operands in registers
        assert report.spilled <= (0 if dtype != SINGLE or width < 128 else 512), report
    assert dtype == SINGLE or reports[0].hmma > 0
