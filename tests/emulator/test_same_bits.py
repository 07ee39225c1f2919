"""Threads that hold one number hold the same bits of it, so that it does not matter which of them
a GPU lets store it.
"""

from __future__ import annotations

import pytest
import torch

from flashmark import hybrid_attention
from flashmark.nystrom import nystrom_attention
from tests.hybrid.cases import Case as HybridCase
from tests.nystrom.cases import Case

from .device import emulating
from .machine import Options

TOKENS = ("query", "key", "value")
CASES = {
    "decay": Case(40, 8, decay=0.1),
    "pieces": Case(40, 8, decay=0.1, spread=300.0),
    "mass": Case(40, 8, decay=0.1, normalize="mass"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_nystrom_in_float32(case):
    with emulating(90, Options(same_bits=True)) as device:
        out = nystrom_attention(**case.arguments(), backend="triton")
        out.sum().backward()
    assert {"rows_kernel", "keys_kernel"} <= {launch.kernel for launch in device.launches}


def test_a_weight_is_the_same_in_all_sums_of_a_decoding_step():
    """Else the means that slots keep are no means, by a rounding of scores in the hundreds."""
    case = HybridCase(6, 2, 5, spread=300.0)
    arguments = {n: x.detach() if torch.is_tensor(x) else x for n, x in case.arguments().items()}
    state = case.empty_state()
    with emulating(90, Options(same_bits=True)) as device:
        for i in range(case.n):
            token = {n: x[:, :, i : i + 1] for n, x in arguments.items() if n in TOKENS}
            hybrid_attention(
                **arguments | token, state=state, state_out=state, return_state=True,
                backend="triton",
            )  # fmt: skip
    assert "step_kernel" in {launch.kernel for launch in device.launches}
