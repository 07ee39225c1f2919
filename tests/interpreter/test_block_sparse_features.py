"""Bias, sinks, softcap, dropout, offsets, lengths and odd shapes, through the Triton kernels."""

from __future__ import annotations

import dataclasses
import importlib
import itertools

import pytest
import torch

import flashmark
from flashmark import masks, reference
from flashmark.block_sparse.call import Call as SparseCall
from flashmark.kernels.block_sparse import configs, forward
from tests.helpers import assert_identical
from tests.interpreter.attention_cases import Call, Case, check

WINDOW = masks.sliding_window(30)

FEATURES = {
    "softcap": Case(softcap=1.5),
    "negative-scale": Case(scale=-0.3),
    "sinks": Case(sinks=True),
    "sinks-and-masked-rows": Case(mask=masks.causal() & ~masks.prefix(20), sinks=True),
    "relative-bias": Case(bias=(2, 139)),
    "relative-bias-half": Case(bias=(2, 139), bias_dtype=torch.bfloat16, dtype=torch.bfloat16),
    "relative-bias-wide-tiles": Case(bias=(2, 139), block=(16, 64)),
    "relative-bias-rectangular": Case(bias=(2, 109), q_len=40),
    "dense-bias": Case(bias=(2, 2, 70, 70), batch=2),
    "dense-bias-of-heads": Case(bias=(1, 2, 70, 70), batch=2),
    "dense-bias-of-samples": Case(bias=(2, 1, 70, 70), batch=2),
    "dense-bias-of-keys": Case(bias=(2, 1, 1, 70), batch=2),
    "dense-bias-of-queries": Case(bias=(1, 2, 70, 1), batch=2),
    "dense-bias-scalar": Case(bias=(1, 1, 1, 1), batch=2),
    "dropout": Case(dropout_p=0.3),
    "no-lse-gradient": Case(lse_gradient=False),
    "query-offset": Case(query_offset=(9, 30), batch=2, q_len=35, rows=70),
    "query-offset-shared": Case(query_offset=(30,), batch=2, q_len=35, rows=70),
    "query-offset-bias": Case(query_offset=(9, 30), batch=2, q_len=35, rows=70, bias=(2, 139)),
    "kv-lengths": Case(kv_lengths=(0, 45), batch=2),
    "everything": Case(
        query_offset=(9, 30),
        batch=2,
        heads=4,
        kv_heads=2,
        q_len=35,
        rows=70,
        bias=(4, 139),
        kv_lengths=(33, 64),
        softcap=2.0,
        sinks=True,
        dropout_p=0.2,
        v_dim=24,
    ),
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("mask", [masks.causal(), WINDOW], ids=["causal", "window"])
def test_feature(name, mask, device):
    case = FEATURES[name]
    kv_len = case.kv_len or 70
    case = dataclasses.replace(case, mask=mask if case.mask is None else case.mask, kv_len=kv_len)
    check(case, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["softcap", "sinks", "relative-bias", "dense-bias", "dropout"])
def test_feature_in_half_precision(name, dtype, device):
    check(dataclasses.replace(FEATURES[name], mask=WINDOW, kv_len=70, dtype=dtype), device)


@pytest.mark.parametrize(
    "dims", [(1, 1), (17, 5), (72, 72), (96, 40), (104, 104), (64, 200)], ids=str
)
def test_head_dimensions(dims, device):
    dim, v_dim = dims
    case = Case(mask=WINDOW, heads=1, q_len=40, dim=dim, v_dim=v_dim)
    check(case, device)
    check(dataclasses.replace(case, mask=masks.causal(), dtype=torch.float16), device)


@pytest.mark.parametrize("q_len", [1, 17, 31, 33, 63, 64, 65])
def test_lengths(q_len, device):
    check(Case(mask=WINDOW, heads=1, q_len=q_len), device)
    check(Case(mask=masks.causal(), heads=1, q_len=q_len), device)


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
def test_strides(layout, device):
    check(Case(mask=WINDOW, batch=2, heads=4, kv_heads=2, q_len=40, layout=layout), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lse_far_below_zero(dtype, device):
    """N % 128 == 64 and lse < -88.7, where e^-lse overflows: padding must not come to inf * 0."""
    case = Case(
        mask=masks.causal(), heads=1, q_len=192, dim=16, block=128, bias=(1, 383), dtype=dtype
    )
    call = Call(case, device)
    call.bias -= 150.0
    expected = call.reference()
    assert expected["lse"].max() < -88.7
    out, lse = call.forward()
    budget = call.budget(expected)
    for deterministic in (True, False):
        got = {"out": out, "lse": lse} | call.backward(out, lse, deterministic)
        for name, tensor in got.items():
            error = (tensor - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= budget[name], name


def test_minus_infinity_in_a_bias_masks(device):
    """A dense bias of -inf hides keys, and whole rows, like a mask."""
    case = Case(mask=masks.causal(), heads=1, q_len=50, bias=(1, 1, 50, 50))
    call = Call(case, device)
    hidden = torch.rand(50, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[7], hidden[33] = True, True
    call.bias[0, 0, hidden.to(device)] = float("-inf")
    expected = call.reference()
    out, lse = call.forward()
    assert (lse[..., 7] == float("-inf")).all() and (out[..., 7, :] == 0).all()
    for deterministic in (True, False):
        got = {"out": out, "lse": lse} | call.backward(out, lse, deterministic)
        for name, tensor in got.items():
            reached = expected[name].isfinite() & ~expected[name].isnan()
            assert torch.allclose(tensor.double()[reached], expected[name][reached], atol=2e-5), (
                name
            )
            assert not tensor.isnan().any(), name


def test_a_sink_and_no_key(device):
    """Output 0, lse = sink, and the sink gets the gradient of the lse."""
    nothing = masks.blocks(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 32)
    call = Call(Case(mask=nothing, q_len=64, sinks=True), device)
    out, lse = call.forward()
    assert (out == 0).all()
    assert_identical(lse, call.sinks.view(1, 2, 1).expand_as(lse))
    dsinks = call.backward(out, lse, True)["d sinks"]
    assert torch.allclose(dsinks, call.dlse.sum((0, 2)), rtol=1e-5, atol=1e-5)


def test_dropout_keeps_what_the_definition_says(device):
    """With equal scores and one-hot values, the output shows the mask of every key."""
    q_len, p = 48, 0.4
    query = torch.zeros(1, 2, q_len, 16, device=device)
    value = torch.eye(q_len, device=device).expand(1, 2, q_len, q_len)
    for seed in (0, 7, -1, 2**62 + 12345):
        seeds = torch.tensor([seed], device=device)
        mask = masks.compile_mask(WINDOW, 1, 2, q_len, q_len, device=device, block_size=32)
        call = SparseCall(query, query, value, mask, 1.0, dropout_seed=seeds, dropout_p=p)
        out = forward(call).out
        keep = reference.dropout_keep(seed, p, 1, 2, q_len, q_len, device)
        assert torch.equal(out > 0, keep & mask.to_dense())


# tiles past a call's end add nothing to entries that other tiles have summed
AS_MANY_AS_SCORES = {
    "one-query": Case(mask=masks.sliding_window(30), q_len=1, kv_len=70, bias=(1, 2, 1, 70)),
    "one-key": Case(
        mask=masks.dense(torch.ones(150, 1, dtype=torch.bool)), q_len=150, kv_len=1,
        bias=(1, 2, 150, 1), sinks=True,
    ),
    "one-score": Case(q_len=1, kv_len=1, bias=(1, 2, 1, 1), sinks=True),
}  # fmt: skip


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("name", AS_MANY_AS_SCORES)
def test_a_bias_with_an_entry_for_each_score(name, block, device):
    check(dataclasses.replace(AS_MANY_AS_SCORES[name], block=block), device)


@pytest.mark.parametrize(
    "bias", [None, (4, 139), (1, 4, 1, 70)], ids=["no-bias", "relative", "dense"]
)
def test_deterministic_mode_repeats_bitwise(bias, device):
    call = Call(Case(mask=WINDOW, batch=2, heads=4, kv_heads=2, bias=bias, sinks=True), device)
    out, lse = call.forward()
    first, second = (call.backward(out, lse, True) for _ in range(2))
    for name, grad in first.items():
        assert_identical(grad, second[name], name)


def test_bias_gradient_of_any_size_in_deterministic_mode(device):
    """Fixed point adapts to the size of the gradient, and a gradient of 0 stays 0."""
    call = Call(Case(mask=WINDOW, bias=(2, 139)), device)
    out, lse = call.forward()
    plain = call.backward(out, lse, True)["d bias"]
    dout, dlse = call.dout.clone(), call.dlse.clone()
    for size in (2.0**-60, 2.0**40):
        call.dout, call.dlse = dout * size, dlse * size
        assert torch.allclose(call.backward(out, lse, True)["d bias"], plain * size, rtol=1e-6)
    call.dout, call.dlse = dout * 0, dlse * 0
    assert (call.backward(out, lse, True)["d bias"] == 0).all()


def test_more_query_tiles_than_65535(device):
    """All tiles are on the first grid axis, the one that may be longer; on a GPU they run."""
    module = importlib.import_module("flashmark.kernels.block_sparse.forward")
    tiles = 65_536 + 2
    config = configs.Config(32, 32, 4, 1)
    q_len = tiles * config.block_m
    query = torch.zeros(1, 1, 1, 1, device=device).expand(1, 1, q_len, 1)
    value = torch.tensor([1.0, 2.0, 6.0], device=device).view(1, 1, 3, 1)
    mask = masks.compile_mask(None, 1, 1, q_len, 3, device=device)
    call = SparseCall(query, value, value, mask, 1.0)
    if device.type == "cuda":
        with configs.using(forward=config):
            out = forward(call).out
        assert ((out - 3.0).abs() < 1e-5).all()
        return
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    with pytest.MonkeyPatch.context() as patch, configs.using(forward=config):
        patch.setattr(module, "forward_kernel", Recorder())
        forward(call)
    assert grids == [(tiles,)]


@pytest.mark.parametrize("section", [1, 3, 100])
def test_any_order_of_programs_covers_every_tile(section, device, monkeypatch):
    """However many heads run side by side for the cache's sake, each tile is computed once."""
    from flashmark.kernels.block_sparse import passes

    monkeypatch.setattr(passes, "_section", lambda pairs, pair_bytes: min(pairs, section))
    for name in ("_over_queries", "_over_keys"):  # without what they remember
        monkeypatch.setattr(passes, name, getattr(passes, name).__wrapped__)
    check(Case(mask=WINDOW, batch=2, heads=4, kv_heads=2, q_len=40), device)


def test_tile_sizes_divide_the_block(device):
    from flashmark.kernels.block_sparse import configs

    for arch, block_q, block_kv, dim, pass_ in itertools.product(
        (80, 90, 100, "gfx942"),
        (16, 32, 64, 128),
        (16, 32, 64, 128),
        (16, 64, 128, 256),
        configs.PASSES,
    ):
        config = configs.choose(arch, torch.bfloat16, dim, (block_q, block_kv), pass_)
        assert block_kv % config.block_n == 0
        assert pass_ == "decode" or block_q % config.block_m == 0


def test_rows_so_far_apart_that_a_tile_outgrows_32_bits(device, tmp_path):
    """A file with holes is the memory: the last of 32 rows lies beyond 2^31 elements."""
    if device.type != "cpu":
        pytest.skip("maps a file")
    length, dim, stride = 32, 16, 70_000_000
    size = (length - 1) * stride + dim
    whole = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.float16)
    far = whole.as_strided((1, 1, length, dim), (size, size, stride, 1))
    near = torch.randn(1, 1, length, dim, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    results = []
    for x in (near, far):
        leaves = [x.detach().requires_grad_() for _ in range(3)]
        out, lse = flashmark.block_sparse_attention(
            *leaves, masks.causal(), return_lse=True, deterministic=True, backend="triton"
        )
        results.append((out, lse, *torch.autograd.grad(out, leaves, near)))
    for apart, together in zip(results[1], results[0], strict=True):
        assert torch.equal(apart, together)
