"""The Gluon form of the backward kernels: gradients against the definition, and which calls it
computes.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from flashmark import masks
from flashmark.kernels.block_sparse import configs, forms
from flashmark.kernels.block_sparse.arguments import describe
from tests.helpers import relative_error
from tests.interpreter import gluon_backward
from tests.interpreter.attention_cases import Call, Case
from tests.interpreter.running import INTERPRETED
from tests.interpreter.test_block_sparse_features import AS_MANY_AS_SCORES
from tests.interpreter.test_block_sparse_forms import MASKS, random_bits

HALF = torch.float16


@pytest.fixture
def gluon(device):
    """A context in which gradients are computed in Gluon."""
    if INTERPRETED:
        return gluon_backward.emulated
    if configs.device_arch(device) == 90:
        return contextlib.nullcontext
    pytest.skip("the Gluon form needs compute capability 9.0")


def gradients(gluon, call: Call, out: torch.Tensor, lse: torch.Tensor, deterministic: bool = False):
    with gluon():
        return call.backward(out, lse, deterministic)


def form_of(call: Call) -> str:
    tensors = (call.query, call.key, call.value, call.dout)
    return forms.backward_form(*tensors, describe(call.checked()))


def check(
    gluon, case: Case, device: torch.device, modes: tuple[bool, ...] = (False,)
) -> dict[str, torch.Tensor]:
    """Gradients are as close to the definition as those of the pointer form must be."""
    case = dataclasses.replace(case, dtype=case.dtype if case.dtype != torch.float32 else HALF)
    call = Call(case, device)
    with gluon():
        assert form_of(call) == "gluon"
    expected = call.reference()
    budget = call.budget(expected)
    out, lse = call.forward()
    for deterministic in modes:
        got = gradients(gluon, call, out, lse, deterministic)
        for name, tensor in got.items():
            error = relative_error(tensor, expected[name])
            assert error <= budget[name], f"{name}: error {error:.2e}, allowed {budget[name]:.2e}"
    return got


@pytest.mark.parametrize("name", MASKS)
def test_mask(gluon, name, device):
    check(gluon, Case(mask=MASKS[name], kv_heads=1, q_len=150, dim=32, block=64), device)


@pytest.mark.parametrize("q_len", [1, 17, 127, 129, 200])
def test_lengths(gluon, q_len, device):
    """Tiles of 128 queries or keys, the last one ragged."""
    for mask in (masks.causal(), masks.sliding_window(150), None):
        check(gluon, Case(mask=mask, heads=1, q_len=q_len, block=128), device)


@pytest.mark.parametrize("shape", [(70, 200), (200, 70)], ids=str)
def test_fewer_or_more_keys_than_queries(gluon, shape, device):
    for mask in (masks.causal(), masks.sliding_window(50)):
        q_len, kv_len = shape
        case = Case(mask=mask, heads=1, q_len=q_len, kv_len=kv_len, block=64)
        check(gluon, case, device)


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (72, 40), (128, 128), (8, 24)], ids=str)
def test_head_dimensions(gluon, dims, device):
    dim, v_dim = dims
    mask = masks.sliding_window(90)
    block = 64 if max(dims) <= 64 else 128
    check(gluon, Case(mask=mask, heads=1, q_len=70, dim=dim, v_dim=v_dim, block=block), device)


def test_bfloat16(gluon, device):
    for mask in (masks.causal(), masks.sliding_window(90)):
        case = Case(mask=mask, heads=1, q_len=100, dim=64, block=64, dtype=torch.bfloat16)
        check(gluon, case, device)


@pytest.mark.parametrize("block", [128, (128, 64), (64, 128)], ids=str)
def test_runs_of_full_tiles(gluon, block, device):
    """Lines whose full tiles come in several runs, lines that have none, and some that are
    empty.
    """
    tiles = random_bits(1, 1, 2, 5, density=0.6, seed=3)
    tiles[..., 1, :] = False
    mask = masks.blocks(tiles, 128) & masks.mask_mod(lambda b, h, i, j: (j < 384) | (i + j < 600))
    check(gluon, Case(mask=mask, heads=1, q_len=256, kv_len=640, block=block), device)


def test_more_tiles_than_stages(gluon, device):
    mask = masks.causal() & masks.sliding_window(430)
    case = Case(mask=mask, heads=2, kv_heads=1, q_len=450, dim=128, v_dim=128, block=128)
    check(gluon, case, device)


def test_fully_masked_rows(gluon, device):
    visible = random_bits(1, 2, 140, 140)
    visible[:, 1] = False
    visible[:, :, 20:100] = False
    visible[..., 64:] = False
    got = check(gluon, Case(mask=masks.dense(visible), q_len=140, block=64), device)
    assert (got["d query"][:, 1] == 0).all() and (got["d query"][:, 0, 20:100] == 0).all()
    for name in ("d key", "d value"):
        assert (got[name][:, 1] == 0).all() and (got[name][:, :, 64:] == 0).all()


def test_per_sample_and_head_masks_with_grouped_heads(gluon, device):
    mask = masks.dense(random_bits(2, 4, 70, 70))
    check(gluon, Case(mask=mask, batch=2, heads=4, kv_heads=2, q_len=70, block=64), device)


def test_sinks_and_a_negative_scale(gluon, device):
    mask = masks.causal() & ~masks.prefix(20)
    assert "d sinks" in check(gluon, Case(mask=mask, q_len=90, block=64, sinks=True), device)
    check(gluon, Case(mask=masks.causal(), q_len=90, sinks=True, scale=-0.3), device)


def test_strides(gluon, device):
    case = Case(mask=MASKS["window"], batch=2, heads=2, kv_heads=1, q_len=70, block=64, dim=32)
    check(gluon, dataclasses.replace(case, layout="bnhd"), device)


def test_gradients_repeat_bitwise(gluon, device):
    call = Call(Case(mask=masks.causal(), kv_heads=1, q_len=150, block=64, dtype=HALF), device)
    out, lse = call.forward()
    first = gradients(gluon, call, out, lse)
    again = gradients(gluon, call, out, lse, deterministic=True)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("feature", [{}, {"bias": (1, 299)}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["causal", "window"])
def test_what_a_query_does_not_see_changes_nothing(gluon, name, feature, device):
    """A value of the future is infinite: gradients of earlier queries, keys and values stay."""
    mask = masks.causal() if name == "causal" else masks.causal() & masks.sliding_window(40)
    call = Call(Case(mask=mask, heads=1, q_len=150, block=64, dtype=HALF, **feature), device)
    out, lse = call.forward()
    before = gradients(gluon, call, out, lse)
    call.value[..., 101:, :] = float("inf")
    after = gradients(gluon, call, out, lse)
    of_tokens = [name for name in before if name != "d bias"]
    assert all(torch.equal(before[n][..., :101, :], after[n][..., :101, :]) for n in of_tokens)


@pytest.mark.parametrize("name", ["causal", "random-bits"])
def test_scores_far_apart(gluon, name, device):
    """A hidden score may be so far above a row's lse that its probability is infinite."""
    case = Case(mask=MASKS[name], kv_heads=1, q_len=150, block=64, dtype=HALF, sinks=True)
    call = Call(case, device, magnitude=60.0)
    expected = call.reference()
    budget = call.budget(expected)
    for name, tensor in gradients(gluon, call, *call.forward()).items():
        assert tensor.isfinite().all(), name
        assert relative_error(tensor, expected[name]) <= budget[name], name


PAST = masks.causal() & ~masks.prefix(20)
WINDOW = masks.causal() & masks.sliding_window(190)
FEATURES = {
    "softcap": Case(mask=PAST, softcap=2.0, sinks=True),
    "softcap-causal": Case(mask=masks.causal(), softcap=2.0, kv_heads=1, dtype=torch.bfloat16),
    "query-offset": Case(mask=PAST, query_offset=(65,), q_len=60, rows=140, kv_len=140),
    "query-offset-causal": Case(
        mask=masks.causal(), batch=2, query_offset=(3, 70), q_len=66, rows=140, kv_len=140
    ),
    "one-query-with-offset": Case(
        mask=masks.causal(), batch=2, kv_heads=1, query_offset=(99, 139), q_len=1, rows=140,
        kv_len=140,
    ),
    "kv-lengths": Case(batch=3, heads=1, kv_lengths=(0, 45, 70)),
    "kv-lengths-causal": Case(mask=masks.causal(), batch=2, q_len=150, kv_lengths=(133, 150)),
    "kv-lengths-sparse": Case(mask=WINDOW, batch=3, heads=1, q_len=250, kv_lengths=(0, 130, 221)),
    "offset-and-lengths": Case(
        mask=masks.sliding_window(100), batch=2, kv_heads=1, q_len=70, rows=200, kv_len=200,
        query_offset=(10, 130), kv_lengths=(80, 200), softcap=3.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_feature(gluon, name, device):
    check(gluon, dataclasses.replace(FEATURES[name], block=64, v_dim=24), device)


BIASES = {
    "relative": Case(mask=PAST, heads=4, kv_heads=2, bias=(4, 139), sinks=True),
    "relative-of-all": Case(bias=(2, 399), q_len=200, heads=2, kv_heads=1),
    "relative-causal": Case(mask=masks.causal(), batch=2, bias=(2, 299), q_len=150, scale=-0.3),
    "relative-half": Case(
        mask=WINDOW, bias=(2, 499), q_len=250, dtype=torch.bfloat16, bias_dtype=torch.bfloat16
    ),
    "relative-rectangular": Case(mask=WINDOW, bias=(2, 269), q_len=70, kv_len=200),
    "relative-offset": Case(
        mask=PAST, batch=2, query_offset=(3, 70), q_len=66, rows=140, kv_len=140, bias=(2, 279)
    ),
    "relative-everything": Case(
        mask=masks.sliding_window(100), batch=2, heads=4, kv_heads=2, q_len=70, rows=200,
        kv_len=200, query_offset=(10, 130), kv_lengths=(80, 200), softcap=3.0, sinks=True,
        bias=(4, 399),
    ),
    "relative-lengths-causal": Case(
        mask=masks.causal(), batch=3, heads=1, q_len=150, kv_lengths=(0, 133, 150), bias=(1, 299)
    ),
    "dense": Case(mask=PAST, batch=2, bias=(2, 2, 70, 70)),
    "dense-half": Case(
        mask=masks.causal(), bias=(1, 2, 150, 150), q_len=150, kv_heads=1, dtype=torch.bfloat16,
        bias_dtype=torch.bfloat16,
    ),
    "dense-of-heads": Case(mask=masks.causal(), batch=2, bias=(1, 2, 70, 70)),
    "dense-of-samples": Case(mask=PAST, heads=4, kv_heads=2, batch=2, bias=(2, 1, 70, 70)),
    "dense-of-keys": Case(mask=WINDOW, batch=2, q_len=200, bias=(2, 1, 1, 200)),
    "dense-of-queries": Case(batch=2, bias=(1, 2, 70, 1)),
    "dense-scalar": Case(mask=PAST, batch=2, bias=(1, 1, 1, 1)),
    "dense-everything": Case(
        mask=masks.sliding_window(100), batch=2, heads=4, kv_heads=2, q_len=70, rows=200,
        kv_len=200, query_offset=(10, 130), kv_lengths=(80, 200), softcap=3.0, bias=(1, 4, 70, 200),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_bias(gluon, name, device):
    case = dataclasses.replace(BIASES[name], block=64)
    assert "d bias" in check(gluon, case, device, modes=(True, False))


DROPOUT = {
    "sparse": Case(mask=PAST, heads=4, kv_heads=2, dropout_p=0.3, q_len=150, sinks=True),
    "causal": Case(mask=masks.causal(), batch=2, q_len=150, dropout_p=0.5, scale=-0.3),
    "of-all": Case(q_len=130, kv_len=200, dropout_p=0.1, dtype=torch.bfloat16),
    "offset": Case(
        mask=PAST, batch=2, query_offset=(3, 70), q_len=66, rows=140, kv_len=140, dropout_p=0.2
    ),
    "lengths": Case(
        mask=WINDOW, batch=3, heads=1, q_len=250, kv_lengths=(0, 130, 221), dropout_p=0.2
    ),
    "relative": Case(mask=WINDOW, bias=(2, 499), q_len=250, kv_heads=1, dropout_p=0.2),
    "everything": Case(
        mask=masks.sliding_window(100), batch=2, heads=4, kv_heads=2, q_len=70, rows=200,
        kv_len=200, query_offset=(10, 130), kv_lengths=(80, 200), softcap=3.0, bias=(1, 4, 70, 200),
        dropout_p=0.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("block", [64, 128, (64, 128)], ids=str)
@pytest.mark.parametrize("name", AS_MANY_AS_SCORES)
def test_a_bias_with_an_entry_for_each_score(gluon, name, block, device):
    case = dataclasses.replace(AS_MANY_AS_SCORES[name], block=block)
    check(gluon, case, device, modes=(True, False))


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(gluon, name, device):
    check(gluon, dataclasses.replace(DROPOUT[name], block=64), device, modes=(True, False))


@pytest.mark.parametrize("feature", [{"bias": (2, 499)}, {"dropout_p": 0.2}], ids=str)
def test_wide_heads(gluon, feature, device):
    case = Case(mask=WINDOW, dim=128, q_len=250, block=128, heads=2, kv_heads=1)
    check(gluon, dataclasses.replace(case, **feature), device, modes=(True, False))


@pytest.mark.parametrize("bias", [(2, 299), (1, 2, 150, 150), (1, 1, 150, 150)], ids=str)
def test_gradients_of_a_bias_repeat_bitwise(gluon, bias, device):
    case = Case(mask=masks.causal(), kv_heads=1, q_len=150, block=64, dtype=HALF, bias=bias)
    call = Call(case, device)
    out, lse = call.forward()
    first = gradients(gluon, call, out, lse, deterministic=True)
    again = gradients(gluon, call, out, lse, deterministic=True)
    assert all(torch.equal(first[name], again[name]) for name in first)


PLAIN = Case(mask=masks.sliding_window(30), dtype=HALF, block=64)
WITH_POINTERS = {
    "dtype": {"dtype": torch.float32},
    "head dimension": {"dim": 136},
    "width of a row": {"dim": 20},
    "gaps between rows": {"layout": "gaps"},
    "small blocks": {"block": 32},
    "small blocks of wide heads": {"dim": 72},
}


@pytest.mark.parametrize("name", WITH_POINTERS)
def test_other_calls_go_to_the_pointer_form(name, device, monkeypatch):
    monkeypatch.setattr(configs, "device_arch", lambda device: 90)
    assert form_of(Call(PLAIN, device)) == "gluon"
    assert form_of(Call(dataclasses.replace(PLAIN, **WITH_POINTERS[name]), device)) == "pointers"


def test_a_config_of_the_pointer_form_is_obeyed(device, monkeypatch):
    monkeypatch.setattr(configs, "device_arch", lambda device: 90)
    with configs.using(backward_q=configs.Config(64, 64, 8, 2)):
        assert form_of(Call(PLAIN, device)) == "pointers"


def test_other_gpus_take_the_pointer_form(device, monkeypatch):
    monkeypatch.setattr(configs, "device_arch", lambda device: 80)
    assert form_of(Call(PLAIN, device)) == "pointers"
