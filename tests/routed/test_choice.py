"""The choice of blocks by the C++ kernel: that of the definition, to within rounding of scores."""

from __future__ import annotations

import pytest
import torch

from flashmark import cpu
from flashmark.routed.choice import Choice, choose_by
from flashmark.routed.places import blocks_of, starts_of
from flashmark.routed.summaries import summarize
from tests import helpers
from tests.routed.cases import integers

if not cpu.available():
    pytest.skip(cpu.why_not(), allow_module_level=True)


def choice(
    batch=1, heads=4, kv_heads=2, q_len=200, kv_len=200, dim=16, *, marks=3, top_k=3, block_size=8,
    near=1, dtype=torch.float32, offset=None, packed=None, keep=None,
) -> Choice:  # fmt: skip
    query, key, _ = helpers.qkv(
        batch, heads, q_len, dim, kv_heads=kv_heads, kv_len=kv_len, dtype=dtype, grad=False
    )
    starts = None if packed is None else starts_of(packed, kv_len)
    sequences = 1 if packed is None else len(packed) - 1
    blocks = blocks_of(kv_len, starts, sequences, block_size, "cpu")
    landmarks = helpers.randn(kv_heads, marks, dim, seed=5) if marks > 1 else None
    state = summarize(key, landmarks, 0.3, keep, blocks)
    return Choice(
        query, *state, top_k, block_size, near, 0.3, kv_len, offset, starts, blocks.base
    )  # fmt: skip


CHOICES = {
    "plain": {},
    "means": {"marks": 1},
    "one-head": {"marks": 1, "heads": 2},
    "every-block": {"top_k": 100},
    "many": {"top_k": 20, "block_size": 2, "q_len": 150, "kv_len": 150},
    "one": {"top_k": 1, "near": 0},
    "none": {"top_k": 0},
    "many-landmarks": {"marks": 100, "q_len": 70, "kv_len": 70},
    "wide": {"dim": 256, "heads": 6},
    "odd": {"dim": 33, "block_size": 7, "batch": 2},
    "decode": {"q_len": 1},
    "few-queries": {"q_len": 4, "batch": 2},
    "sixteen-queries": {"q_len": 16, "heads": 8},
    "one-key-head": {"q_len": 3, "heads": 6, "kv_heads": 1},
    "offsets": {"batch": 2, "q_len": 30, "offset": integers(170, 3)},
    "packed": {"packed": integers(0, 7, 7, 90, 200)},
    "hidden-keys": {"batch": 2, "keep": torch.arange(200).expand(2, -1) // 24 % 2 == 1},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_is_the_one_of_plain_pytorch(name):
    call = choice(**CHOICES[name])
    found, expected = choose_by(call, "cpu"), choose_by(call, "eager")
    assert found.dtype == torch.int32 and found.shape == expected.shape
    assert torch.equal(found, expected)  # scores of these inputs differ by more than rounding


def test_ties_go_to_the_lower_block():
    call = choice(marks=1, top_k=4)
    call.keys.zero_()
    call.log_counts.zero_()
    found = choose_by(call, "cpu")
    assert torch.equal(found[0, 0, -1], integers(0, 1, 2, 3))
    assert torch.equal(found, choose_by(call, "eager"))


@pytest.mark.parametrize("q_len", [200, 1], ids=["prefill", "decode"])
def test_nan_and_minus_infinity_are_never_chosen(q_len):
    call = choice(marks=2, top_k=30, q_len=q_len)
    call.keys[:, :, 3] = float("nan")
    call.log_counts[:, :, 5] = float("-inf")
    found = choose_by(call, "cpu")
    assert not ((found == 3) | (found == 5)).any()
    assert torch.equal(found, choose_by(call, "eager"))


@pytest.mark.parametrize("heads", [2, 8], ids=["one-head", "groups-of-4"])
@pytest.mark.parametrize("marks", [1, 2])
@pytest.mark.parametrize("q_len", [200, 1], ids=["prefill", "decode"])
def test_plus_infinity_is_chosen_first(q_len, marks, heads):
    call = choice(marks=marks, top_k=4, q_len=q_len, heads=heads)
    call.log_counts[:, :, 3, 0] = call.log_counts[:, :, 7, 0] = float("inf")
    call.log_counts[:, :, 9] = float("nan")
    call.log_counts[:, :, 9, 0] = float("inf")
    found = choose_by(call, "cpu")
    assert (found[:, :, -1, :2] == integers(3, 7)).all()
    assert marks == 1 or not (found == 9).any()
    assert torch.equal(found, choose_by(call, "eager"))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("q_len", [200, 4], ids=["prefill", "decode"])
def test_a_row_of_nan_in_one_head_chooses_nothing_for_its_group(q_len, backend):
    call = choice(q_len=q_len, heads=6)
    call.query[:, 1, 2] = float("nan")
    found = choose_by(call, backend)
    assert (found[:, 0, 2] == -1).all() and (found[:, 1, -1] >= 0).all()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("q_len", [40, 1], ids=["prefill", "decode"])
def test_a_head_of_small_scores_has_as_much_to_say_as_one_of_large_scores(q_len, backend):
    """The mean of probabilities: the second head's best block comes before the first's second."""
    keys = torch.zeros(1, 1, 5, 1, 2)
    keys[0, 0, 0, 0, 0], keys[0, 0, 1, 0, 0], keys[0, 0, 2, 0, 1] = 10.0, 9.0, 5.0
    query = torch.tensor([[10.0, 0.0], [0.0, 1.0]])[None, :, None].expand(1, 2, q_len, 2)
    call = Choice(query.contiguous(), keys, torch.zeros(1, 1, 5, 1), 2, 8, 1, 1.0, 40)
    assert choose_by(call, backend)[0, 0, -1].tolist() == [0, 2]


@pytest.mark.parametrize("last", [20, 64, 130])
def test_choice_ignores_the_future_bitwise(last):
    call = choice()
    expected = choose_by(call, "cpu")
    call.query[:, :, last + 1 :] = float("nan")
    call.keys[:, :, last // 8 + 1 :] = float("nan")
    found = choose_by(call, "cpu")
    assert torch.equal(found[:, :, : last + 1], expected[:, :, : last + 1])


def test_any_number_of_threads_gives_the_same_choice():
    call, before = choice(q_len=500, kv_len=500), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = choose_by(call, "cpu")
        torch.set_num_threads(5)
        assert torch.equal(choose_by(call, "cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["plain", "packed", "decode"])
def test_opcheck(name):
    call = choice(**CHOICES[name])
    flat = [getattr(call, field) for field in call.__dataclass_fields__]
    torch.library.opcheck(torch.ops.flashmark.choose_blocks.cpu, flat)


def test_summaries_of_another_dtype_are_refused():
    call = choice()
    with pytest.raises(RuntimeError, match="keys, log_counts: expected float32"):
        choose_by(Choice(call.query, call.keys.double(), *(
            getattr(call, field) for field in list(call.__dataclass_fields__)[2:]
        )), "cpu")  # fmt: skip
