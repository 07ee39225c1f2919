"""Decoding by the Triton kernels of Nyström attention: the state is overwritten in place."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from flashmark import NystromState, nystrom_attention
from tests import helpers
from tests.interpreter.running import DEVICE
from tests.nystrom.cases import Case


def run(arguments, **options):
    arguments = tree_map_only(torch.Tensor, lambda x: x.detach().to(DEVICE), arguments)
    with torch.no_grad():
        return nystrom_attention(**arguments, **options, backend="triton")


CASES = [
    Case(5, 8, group=2, v_dim=24, decay=0.1),
    Case(3, 8, v_dim=150),
    Case(4, 20, normalize="mass", v_dim=70),
    Case(20, 8, state=True),
]


@pytest.mark.parametrize("alias", [True, False], ids=["in-place", "apart"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_out_holds_the_state_after_the_last_token(case, alias):
    arguments = case.arguments()
    arguments.pop("state", None)
    shape = case.batch, 1, case.marks
    L, R = helpers.randn(*shape, seed=5), helpers.randn(*shape, case.v_dim, seed=6)
    L[..., 0] = -torch.inf
    wanted, end = run(arguments, state=NystromState(L, R), return_state=True)
    held = NystromState(L.clone().to(DEVICE), R.clone().to(DEVICE))
    target = held if alias else NystromState(*(torch.empty_like(x) for x in held))
    out, returned = run(arguments, state=held, state_out=target, return_state=True)
    assert returned is target
    for actual, expected in ((out, wanted), (target.L, end.L), (target.R, end.R)):
        helpers.assert_identical(actual.cpu(), expected.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalize", ["landmark", "mass"])
def test_hidden_tokens_may_hold_anything(normalize, dtype):
    case = Case(6, 8, normalize=normalize, padding=(2, 1))
    results = []
    for poison in (0.0, torch.nan):
        arguments = case.arguments(dtype)
        hidden = ~arguments["key_mask"][:, None, :, None]
        for name in ("key", "value"):
            arguments[name] = arguments[name].detach().masked_fill(hidden, poison)
        state = NystromState.empty(1, 1, 8, 16, device=DEVICE)
        outs = []
        for t in range(6):
            part = {n: arguments[n][:, :, t : t + 1] for n in ("query", "key", "value")}
            part["key_mask"] = arguments["key_mask"][:, t : t + 1]
            outs.append(run(arguments | part, state=state, state_out=state))
        results.append((torch.cat(outs, 2), *state))
    for clean, poisoned in zip(*results, strict=True):
        helpers.assert_identical(poisoned.cpu(), clean.cpu())
