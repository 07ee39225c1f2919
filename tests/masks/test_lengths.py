"""Lengths and bounds as users have them: one for all samples, NumPy's, without limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashmark import masks

N = 60
COLUMN, ROW = torch.arange(N), torch.arange(N)[:, None]
PER_SAMPLE = {
    "lengths": (masks.key_padding(torch.tensor([10, 50, 33])), [10, 50, 33]),
    "bools": (
        masks.key_padding(COLUMN < torch.tensor([[10], [50], [33]])),
        [10, 50, 33],
    ),
    "nothing-else": (masks.causal() | ~masks.causal(), [N, N, N]),
}
ONE = {
    "prefix": (masks.prefix, lambda n: COLUMN < n),
    "key_padding": (masks.key_padding, lambda n: COLUMN < n),
    "pinned": (masks.pinned, lambda n: (COLUMN < n) | (ROW == COLUMN)),
}


@pytest.mark.parametrize("other", PER_SAMPLE)
@pytest.mark.parametrize("name", ONE)
def test_one_length_is_that_of_all_samples(name, other):
    (make, shown), (beside, lengths) = ONE[name], PER_SAMPLE[other]
    limits = torch.tensor(lengths).view(3, 1, 1, 1)
    for form, wanted in (
        (make(torch.tensor([20])) & beside, shown(20) & (COLUMN < limits)),
        (beside | ~make(torch.tensor([20])), (COLUMN < limits) | ~shown(20)),
    ):
        compiled = masks.compile_mask(form, 3, 2, N, N, device="cpu", block_size=16)
        assert torch.equal(compiled.to_dense().expand(3, 1, N, N), wanted.expand(3, 1, N, N))
        assert torch.equal(form.to_dense(3, 2, N, N).expand(3, 1, N, N), wanted.expand(3, 1, N, N))


@pytest.mark.parametrize(
    "length", [2**31, 2**32 + 4, 2**33 + 5, 2**63 - 1, -1, -(2**32) + 5, -(2**63)]
)
@pytest.mark.parametrize("name", ONE)
def test_length_beyond_int32_is_no_other_length(name, length):
    make, shown = ONE[name]
    mask = make(torch.tensor([length, 7]))
    compiled = masks.compile_mask(mask, 2, 1, N, N, device="cpu", block_size=16)
    wanted = torch.stack([shown(n).expand(N, N) for n in (min(max(length, 0), N), 7)])
    assert torch.equal(compiled.to_dense()[:, 0], wanted)


@pytest.mark.parametrize("huge", [2**31, 2**63 - 1, 2**63, 2**80], ids=str)
def test_bound_beyond_every_length_is_none(huge):
    everything = torch.ones(N, N, dtype=torch.bool)
    for mask, wanted in (
        (masks.sliding_window(huge), everything),
        (masks.sliding_window(huge, huge), everything),
        (masks.sliding_window(huge, 0), everything.tril()),
        (masks.prefix(huge), everything),
        (masks.pinned(huge), everything),
        (masks.dilated(huge), torch.eye(N, dtype=torch.bool)),
        (masks.local_chunks(huge), everything.tril()),
    ):
        compiled = masks.compile_mask(mask, 1, 1, N, N, device="cpu", block_size=16)
        assert torch.equal(compiled.to_dense()[0, 0], wanted)


def test_minus_one_is_no_bound_of_a_window():
    distance = COLUMN - ROW
    for left, right, wanted in (
        (-1, -1, torch.ones(N, N, dtype=torch.bool)),
        (-1, None, torch.ones(N, N, dtype=torch.bool)),
        (-1, 0, distance <= 0),
        (-1, 5, distance <= 5),
        (4, -1, distance > -4),
        (np.int64(-1), np.int32(5), distance <= 5),
    ):
        mask = masks.sliding_window(left, right)
        assert repr(mask) in (f"sliding_window({left}, {right})", repr(eval_mask(mask)))
        for size in (16, 64):
            compiled = masks.compile_mask(mask, 1, 1, N, N, device="cpu", block_size=size)
            assert torch.equal(compiled.to_dense()[0, 0], wanted)


def eval_mask(mask):
    return eval(repr(mask), vars(masks))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(kind):
    given, plain = (
        [
            masks.sliding_window(to(5), to(2)),
            masks.prefix(to(9)),
            masks.pinned(to(9)),
            masks.dilated(to(3)),
            masks.local_chunks(to(8)),
            masks.blocks(torch.eye(4, dtype=torch.bool), to(16), max_blocks=to(16)),
        ]
        for to in (kind, int)
    )
    for a, b in zip(given, plain, strict=True):
        sizes = (kind(1), kind(1), kind(N), kind(N))
        compiled = masks.compile_mask(a, *sizes, device="cpu", block_size=kind(16))
        assert torch.equal(compiled.to_dense(), b.to_dense(1, 1, N, N))
        assert all(type(n) is int for n in compiled.layout)
        assert repr(a) == repr(b) and a.formula == b.formula


def test_a_bool_is_no_integer():
    for make in (masks.sliding_window, masks.prefix, masks.dilated):
        for value in (True, np.bool_(True)):
            with pytest.raises(TypeError, match="expected an int.*got bool"):
                make(value)
