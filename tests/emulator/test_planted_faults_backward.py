"""Faults put into the PTX of the Gluon backward kernels are found, and named."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from flashmark import masks
from flashmark.kernels.block_sparse import configs
from tests.interpreter.attention_cases import Call, Case

from .device import Emulated, emulating
from .machine import Options
from .test_planted_faults import FENCE, ORDERS, matching, reports

KERNELS = ("backward_kv_gluon_kernel", "backward_q_gluon_kernel")
MASK = masks.causal() & masks.sliding_window(170)
# with two stages: more tiles to a line than stages
CASE = Case(mask=MASK, q_len=200, dim=16, block=64, heads=1, dtype=torch.bfloat16)


def run(case: Case = CASE, options: Options | None = None, edit=None) -> dict[str, torch.Tensor]:
    """Gradients of a call in the Gluon form."""
    call, block = Call(case, torch.device("cpu")), (case.block, case.block)
    expected = call.reference()
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulating(90, options, edit))
        for pass_ in ("backward_kv", "backward_q"):
            config = configs.hopper_backward(pass_, block)
            config = dataclasses.replace(config, num_stages=2)
            stack.enter_context(configs.using(**{pass_: config}))
        return call.backward(expected["out"].to(case.dtype), expected["lse"].float(), False)


def outcomes(kernel: str, pattern: str, new, options: Options | None = None) -> Iterator[str]:
    """The report for each place in a kernel, which alone runs; "" where a fault does no harm."""
    launch = Emulated.launch

    def one(self, source, metadata, name, *rest) -> None:
        if name == kernel:
            launch(self, source, metadata, name, *rest)

    def run_edited(edit) -> None:
        with mock.patch.object(Emulated, "launch", one):
            run(options=options, edit=edit)

    return reports(pattern, new, run_edited)


@pytest.mark.parametrize("options", ORDERS, ids=lambda x: f"{x.order}-{x.landing}")
@pytest.mark.parametrize("block", [64, 128])
def test_the_kernels_as_they_are_have_no_fault(block, options):
    run(dataclasses.replace(CASE, block=block, heads=2, kv_heads=1, q_len=150), options)


ARRIVE = r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _[^\n]*;"
WAIT = r"wgmma\.wait_group\.sync\.aligned \d+;"
REMOVED = {
    "a stage is never given back": (ARRIVE, "", r"deadlock.*mbarrier.try_wait"),
    "no wait for a product": (WAIT, "", r"register of a product in flight: %r\d+.*wgmma"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_instruction(kernel, name):
    pattern, new, report = REMOVED[name]
    matching(report, outcomes(kernel, pattern, new))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_proxy_fence_is_needed(kernel):
    """After the barriers' initialisation, by threads, before copies complete on them."""
    report = r"no proxy fence: async write after write.*cp.async.bulk.*mbarrier.init"
    results = list(outcomes(kernel, FENCE, ""))
    assert results and all(re.search(report, text) for text in results), results


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("landing", ["early", "late"])
def test_an_mbarrier_waited_for_in_the_wrong_phase(kernel, landing):
    """The kernel waits for ever, or reads what has not come."""
    pattern = r"(mbarrier\.try_wait\.parity\.\S+ complete, \[%r\d+\], )(%r\d+);"
    phase = 1 if landing == "late" else 0
    options = Options(landing=landing)
    results = outcomes(kernel, pattern, lambda m: f"{m[1]}{phase};", options)
    expected = r"deadlock.*mbarrier.try_wait|race: .* after |uninitialised"
    matching(expected, results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stage_filled_before_it_is_empty_is_a_race(kernel):
    """The loading warp's waits are for the phase that has passed."""
    pattern = r"mbarrier\.try_wait\.parity\.\S+ complete, \[%r\d+\], %r\d+;"
    new = "mov.pred complete, -1;"
    results = outcomes(kernel, pattern, new, Options(order="ahead", landing="early", seed=1))
    matching("race: .*cp.async.bulk", results)
