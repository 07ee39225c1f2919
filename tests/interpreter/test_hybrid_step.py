"""The Triton kernels of a decoding step: one token a sample, with the state in place."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from flashmark import HybridState, hybrid_attention
from flashmark.hybrid import operator
from flashmark.hybrid.call import Call
from flashmark.hybrid.state import tensors_of
from tests import helpers
from tests.hybrid.cases import MERGES, Case, detached, tokens
from tests.interpreter.running import DEVICE


def to_device(x):
    return tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), x)


@pytest.fixture
def steps(monkeypatch):
    """The calls that the kernels of a step have taken."""
    taken, run = [], operator._step

    def note(*flat):
        taken.append(flat)
        return run(*flat)

    monkeypatch.setattr(operator, "_step", note)
    return taken


def decode(arguments: dict, state: HybridState, start: int, stop: int):
    """Outputs of the tokens [start, stop), one a call; `state` moves on in place."""
    outs = []
    for i in range(start, stop):
        part = to_device(tokens(arguments, slice(i, i + 1)))
        out, after = hybrid_attention(
            **part, state=state, state_out=state, return_state=True, backend="triton"
        )
        assert after is state
        outs.append(out.cpu())
    return torch.cat(outs, 2)


CASES = [
    case
    for merge in MERGES
    for case in (
        Case(21, 5, 5, merge, group=2, kv_heads=2, batch=2, v_dim=24),
        Case(5, 1, 3, merge),
        Case(12, 4, 40, merge, dim=33, v_dim=70, layout="bnhd"),
        Case(16, 3, 17, merge, batch=2, padding=(4, 3)),
        Case(12, 3, 5, merge, batch=2, kv_heads=2, landmarks="batched"),
    )
] + [
    Case(12, 3, 5, "gate", landmarks="pair", gate_shape="heads", group=3),
    Case(12, 4, 5, "slots", spread=300.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_from_an_empty_state(case, steps):
    arguments = detached(case.arguments())
    state = to_device(case.empty_state())
    out = decode(arguments, state, 0, case.n)
    assert len(steps) == case.n
    wanted, end = hybrid_attention(**arguments, return_state=True, backend="eager")
    helpers.assert_close(out, wanted, 1e-5 if case.spread == 1.0 else 1e-4)
    live = case.window + case.n % case.window
    for n, (x, y) in enumerate(zip(tensors_of(state), tensors_of(end), strict=True)):
        x, y = x.cpu(), y.cpu()
        if n == 1:
            assert torch.equal(x[:, :live], y[:, :live])
        elif n in (2, 3):
            helpers.assert_close(x[:, :, :live], y[:, :, :live], 1e-6)
        else:
            helpers.assert_close(x, y, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("merge", MERGES)
def test_half_precision_after_a_prompt(merge, dtype):
    arguments = detached(Case(22, 4, 17, merge, group=2).arguments(dtype))
    exact = {n: x.double() if torch.is_tensor(x) else x for n, x in arguments.items()}
    whole = hybrid_attention(**exact, backend="reference")
    plain = hybrid_attention(**arguments, backend="eager")
    _, state = hybrid_attention(
        **to_device(tokens(arguments, slice(0, 10))), return_state=True, backend="eager"
    )
    out = decode(arguments, state, 10, 22)
    error = (out.double() - whole[:, :, 10:]).abs().max()
    eps = torch.finfo(dtype).eps
    plain_error = (plain.double() - whole)[:, :, 10:].abs().max()
    assert error <= 2 * plain_error + 2 * eps * whole.abs().max()


@pytest.mark.parametrize("merge", MERGES)
def test_a_sample_without_a_token_stays_as_it_is(merge):
    case = Case(9, 3, 5, merge, batch=3)
    arguments = detached(case.arguments())
    part = to_device(tokens(arguments, slice(0, 1)))
    state = to_device(case.empty_state())
    decode(arguments, state, 0, 5)  # the next token ends a chunk
    both = tree_map_only(torch.Tensor, torch.clone, state)
    part = to_device(tokens(arguments, slice(5, 6)))
    active = torch.tensor([True, False, True], device=DEVICE)
    core = None
    if merge != "slots":
        core = torch.eye(5, device=DEVICE).expand(1, 5, 5).contiguous()
        part["core"] = core
    fields = tensors_of(state)
    held = fields if merge == "slots" else (*fields[:5], None, fields[5])
    marks = part["landmarks"]
    out = operator.step(
        Call(
            part["query"], part["key"], part["value"], marks, marks, 3, merge, 0.25, core,
            part.get("gate"), None, None, *held, True,
        ),
        active,
    )  # fmt: skip
    before = tree_map_only(torch.Tensor, torch.clone, both)
    wanted = hybrid_attention(**part, state=both, state_out=both, backend="triton")
    helpers.assert_identical(out[active].cpu(), wanted[active].cpu())
    assert not out[~active].any()
    for x, moved, stayed in zip(*map(tensors_of, (state, both, before)), strict=True):
        helpers.assert_identical(x[active].cpu(), moved[active].cpu())
        helpers.assert_identical(x[~active].cpu(), stayed[~active].cpu())


@pytest.mark.parametrize("merge", MERGES)
def test_hidden_tokens_may_hold_anything(merge):
    case = Case(8, 3, 5, merge)
    clean = detached(case.arguments())
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 2:4] = False
    outs = []
    for poison in (0.0, float("nan")):
        hidden = ~mask[:, None, :, None]
        arguments = clean | {"key_mask": mask}
        for name in ("key", "value"):
            arguments[name] = clean[name].masked_fill(hidden, poison)
        outs.append(decode(arguments, to_device(case.empty_state()), 0, 8))
    helpers.assert_identical(*outs)
