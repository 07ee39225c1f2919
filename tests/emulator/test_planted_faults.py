"""Faults put into the PTX of our kernels are found, and named: instruction, warp, address, and the
access that they race with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from unittest import mock

import pytest
import torch

from flashmark import masks
from flashmark.kernels.block_sparse import configs
from tests.interpreter.attention_cases import Call, Case

from .device import emulating
from .machine import Options
from .races import EmulationError

CASE = Case(mask=masks.causal() & masks.sliding_window(90), q_len=150, dim=64, block=64, heads=1,
            dtype=torch.bfloat16)  # fmt: skip


# more tiles to a row than the pipeline has stages
LONG = dataclasses.replace(CASE, mask=masks.causal() & masks.sliding_window(330), q_len=350)


def run(arch: int, form: str = "pointers", edit=None, options: Options | None = None,
        case: Case = CASE):  # fmt: skip
    """The forward pass of one call, its program edited first."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulating(arch, options, edit))
        forward = configs.choose(arch, torch.bfloat16, 64, (64, 64), "forward")
        if form != "pointers":
            forward = configs.hopper(form, 64, (64, 64))
            # two programs, one of which computes two lines
            stack.enter_context(mock.patch.object(configs, "processors", lambda device: 1))
        stack.enter_context(configs.using(forward=forward))
        return Call(case, torch.device("cpu")).forward()


def places(text: str, pattern: str) -> list[re.Match]:
    return list(re.finditer(pattern, text, re.M))


class Planted:
    """Replaces the n-th place that matches a pattern."""

    def __init__(self, pattern: str, new, n: int):
        self.pattern, self.new, self.n, self.count = pattern, new, n, 0

    def __call__(self, name: str, text: str) -> str:
        found = places(text, self.pattern)
        self.count = len(found)
        if self.n >= len(found):
            return text
        match = found[self.n]
        new = self.new(match) if callable(self.new) else self.new
        return text[: match.start()] + new + text[match.end() :]


def outcomes(arch: int, form: str, pattern: str, new, options: Options | None = None,
             case: Case = CASE) -> Iterator[str]:  # fmt: skip
    """The report for each place, "" where a fault there does no harm."""
    return reports(pattern, new, lambda edit: run(arch, form, edit, options, case))


def reports(pattern: str, new, run_edited) -> Iterator[str]:
    """Reports of `run_edited` with the text at each place that matches replaced, in turn."""
    n, count = 0, 1
    while n < count:
        planted = Planted(pattern, new, n)
        try:
            run_edited(planted)
            message = ""
        except EmulationError as error:
            message = str(error)
        n, count = n + 1, planted.count
        if count:
            yield message


def matching(report: str, texts: Iterable[str], least: int = 1) -> list[str]:
    """The first `least` texts with a report: there must be as many."""
    found, others = [], []
    for text in texts:
        (found if re.search(report, text) else others).append(text)
        if len(found) == least:
            return found
    raise AssertionError(f"{len(found)} with {report} among {found + others}")


CTA_BARRIER = r"^\tbar\.sync[^\n]*;"
ANY_RACE = "race: (read|write) after (read|write)"
COPY = "in flight.*the write by warp 0, lane 0.*cp.async"
FENCE = r"fence\.proxy\.async[^\n]*;"


def one_more(match: re.Match) -> str:
    return f"cp.async.wait_group {int(match[1]) + 1}"


REMOVED = {
    # architecture, form, pattern, new text, what the report says, how many places it must find
    "bar.sync-sm80": (80, "pointers", CTA_BARRIER, "", ANY_RACE, 3),
    "bar.sync-sm90": (90, "pointers", CTA_BARRIER, "", ANY_RACE, 3),
    "cp.async.wait_group": (80, "pointers", r"cp\.async\.wait_group[^\n;]*;", "", COPY, 1),
    "cp.async.wait_group-weakened": (
        80, "pointers", r"cp\.async\.wait_group\s+(\d+)", one_more, COPY, 1,
    ),
    "wgmma.wait_group": (
        90, "pointers", r"wgmma\.wait_group\.sync\.aligned \d+;", "",
        r"register of a product in flight: %r\d+.*wgmma", 1,
    ),
    "wgmma.fence": (90, "pointers", r"wgmma\.fence\.sync\.aligned;", "", "no wgmma.fence", 1),
    "fence.proxy.async": (
        90, "pointers", FENCE, "", "no proxy fence: async read after write.*wgmma.*by warp", 1,
    ),
    "store-wait-gluon": (
        90, "gluon", r"cp\.async\.bulk\.wait_group\.read[^\n]*;", "",
        "race: write after read in flight.*the boxes that warp 0 stores|when its CTA ends", 2,
    ),
    "bar.sync-gluon": (90, "gluon", r"^\t(bar|barrier)\.sync[^\n]*;", "", ANY_RACE, 3),
}  # fmt: skip


ORDERS = (
    Options(),
    Options(order="ahead", landing="late", seed=1),
    Options(order="around", landing="drawn"),
)


def test_the_kernels_as_they_are_have_no_fault():
    for arch in (80, 90):
        for options in ORDERS:
            run(arch, options=options)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_instruction(name):
    arch, form, pattern, new, report, least = REMOVED[name]
    for text in matching(report, outcomes(arch, form, pattern, new), least):
        assert re.search(
            r"CTA \d+, warp \d+, lane \d+, address 0x[0-9a-f]+, line \d+: .*\(\w+\.py:\d+\)", text
        )


def test_every_proxy_fence_of_hopper_s_form_is_needed():
    """After the barriers' initialisation; before the output is stored; after values beyond a
    sample's keys are made 0.
    """
    clipped = dataclasses.replace(CASE, kv_lengths=(140,))
    kinds = (
        "write after write.*complete_tx.*mbarrier.init",
        "read after write.*bulk_group.*stmatrix",
        "read after write.*wgmma.*st.shared",
    )
    results = list(outcomes(90, "gluon", FENCE, "", case=clipped))
    assert len(results) == len(kinds)
    for kind in kinds:
        found = [bool(re.search(f"no proxy fence: async {kind}", text)) for text in results]
        assert sum(found) == 1, (kind, results)


@pytest.mark.parametrize("landing", ["early", "late"])
def test_an_mbarrier_waited_for_in_the_wrong_phase(landing):
    """The kernel waits for ever, or reads what has not come."""
    pattern = r"(mbarrier\.try_wait\.parity\.\S+ complete, \[%r\d+\], )(%r\d+);"
    phase = 1 if landing == "late" else 0
    options = Options(landing=landing)
    results = outcomes(90, "gluon", pattern, lambda m: f"{m[1]}{phase};", options)
    expected = r"deadlock.*mbarrier.try_wait|race: .* after |uninitialised"
    matching(expected, results)


def test_a_missing_arrival_is_a_deadlock():
    results = outcomes(
        90, "gluon", r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _[^\n]*;", "", case=LONG
    )
    matching(r"deadlock.*mbarrier.try_wait", results, 6)  # of K, of V and of the queries


def test_a_store_out_of_bounds():
    pattern = r"(st\.global\.v4\.b32 \[ %rd\d+ )\+ 0"
    results = outcomes(80, "pointers", pattern, lambda m: f"{m[1]}+ 1048576")
    matching("out of bounds: 16 bytes of global.*st.global.v4.b32.*bytes after a tensor", results)


SHIFTED = {
    "shuffle": (
        80,
        r"(shfl\.sync\.bfly\.b32\s+\S+ \S+) 1,",
        lambda m: f"{m[1]} 2,",
        "two lanes store",
    ),
    "descriptor": (90, "4611686293305294850", "4611686293305294852", "wgmma"),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_a_wrong_lane_or_place_gives_a_wrong_result(name):
    """A shuffle one step off, where lanes that hold one value store several; a descriptor 32 bytes
    off, which may also read what nobody wrote.
    """
    arch, pattern, new, culprit = SHIFTED[name]
    right, _ = run(arch)
    wrong = []
    planted = Planted(pattern, new, 0)
    while planted.n == 0 or planted.n < planted.count:
        try:
            out, _ = run(arch, edit=planted)
            wrong.append(not torch.allclose(right.float(), out.float(), atol=1e-2))
        except EmulationError as error:
            wrong.append(culprit in str(error))
        planted.n += 1
    assert any(wrong)


def test_rows_that_pad_a_tile_read_no_bias():
    """Decoding two queries of two heads: the tile has 16 rows, and the bias a line to each head."""
    case = Case(mask=masks.causal(), q_len=2, kv_len=300, rows=300, kv_heads=1, bias=(2, 599),
                query_offset=(255,), dim=16)  # fmt: skip
    call = Call(case, torch.device("cpu"))
    with emulating(80) as device:
        call.forward()
    assert [launch.kernel for launch in device.launches] == ["decode_kernel", "merge_kernel"]
