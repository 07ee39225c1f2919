"""The model that orders the candidates: what it counts, by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.candidates import Case  # noqa: E402
from bench.model import (  # noqa: E402
    N,
    Product,
    flops,
    kept,
    predict,
    programs_of_a_processor,
)
from bench.targets import MATRIX  # noqa: E402
from flashmark.kernels.block_sparse.configs import Config  # noqa: E402

FORWARD = Case("block_sparse", "forward", 128)


def test_flops_of_causal_attention_are_those_of_the_table_of_floors():
    assert flops(FORWARD) == pytest.approx(1.10e12, rel=1e-3)
    assert 1e3 * flops(FORWARD) / MATRIX == pytest.approx(1.39, abs=0.005)
    fused = Case("block_sparse", "backward_fused", 128)
    assert 1e3 * flops(fused) / MATRIX == pytest.approx(3.48, abs=0.005)
    both = flops(Case("block_sparse", "backward_q", 128))
    both += flops(Case("block_sparse", "backward_kv", 128))
    assert 1e3 * both / MATRIX == pytest.approx(4.87, abs=0.005)


def test_elements_that_a_mask_keeps():
    assert kept(FORWARD) == N * (N + 1) / 2
    rows = [min(i + 1, 512) for i in range(N)]
    assert kept(Case("block_sparse", "forward", 128, block=128)) == sum(rows)
    assert kept(Case("block_sparse", "forward", 128, block=64)) == kept(FORWARD) / 4


@pytest.mark.parametrize(
    "registers, threads, shared, programs",
    [
        (255, 128, 1024, 2),  # 8 warps of 256 registers a thread fill the file
        (255, 256, 1024, 1),
        (128, 256, 1024, 2),
        (168, 128, 1024, 3),  # 3 warps to each quarter of the file, not 12.19 in all
        (32, 128, 113 * 1024, 2),
        (32, 128, 114 * 1024, 1),
        (32, 128, 0, 16),  # 64 warps
        (32, 32, 0, 32),
        (255, 512, 0, 0),
    ],
)
def test_programs_that_fit_a_multiprocessor(registers, threads, shared, programs):
    assert programs_of_a_processor(registers, threads, shared) == programs


def test_what_a_product_reads_from_shared_memory():
    assert Product(64, 128, 32).bytes_of_shared(warps=4) == 2 * 32 * 128
    assert Product(128, 128, 32).bytes_of_shared(warps=8) == 2 * 2 * 32 * 128
    # two warp groups beside each other read the rows of the first operand twice
    assert Product(64, 128, 32, True).bytes_of_shared(8) == 2 * (32 * 128 + 2 * 64 * 32)


def test_a_prediction_is_never_below_the_time_of_its_products():
    config = Config(128, 64, 8, 3)
    for programs in (1, 2, 8):
        assert predict(FORWARD, config, programs).ms > 1e3 * flops(FORWARD) / MATRIX


def test_what_should_help_helps_and_what_should_hurt_hurts():
    config = Config(128, 64, 8, 2)
    alone = predict(FORWARD, config, 1).ms
    assert predict(FORWARD, config, 2).ms < alone
    assert predict(FORWARD, Config(128, 64, 8, 1), 1).ms > alone
    assert predict(FORWARD, config, 1, spilled=512).ms > alone
    assert predict(FORWARD, Config(64, 64, 8, 2), 1).ms > alone  # keys and values once more
    half = Case("block_sparse", "forward", 64)
    assert predict(half, config, 1).parts["exponentials"] == pytest.approx(
        2 * predict(FORWARD, config, 1).parts["exponentials"]  # as many flops, twice the heads
    )


@pytest.mark.parametrize("pass_", ["forward", "backward_q", "backward_kv", "backward_fused"])
@pytest.mark.parametrize("block", [0, 64, 128])
def test_every_block_sparse_pass_has_a_prediction(pass_, block):
    case = Case("block_sparse", pass_, 64, block=block)
    found = predict(case, case.shipped(), 1)
    assert found.ms > 0 and found.binds in found.parts


@pytest.mark.parametrize("pass_", ["states", "forward", "rows", "keys", "read", "decode"])
def test_every_nystrom_pass_has_a_prediction(pass_):
    case = Case("nystrom", pass_, 64, 64)
    found = predict(case, case.shipped(), 2)
    assert found.ms >= max(found.parts.values()) or pass_ == "decode"
    if pass_ == "forward":  # reads three, writes one, and the states between
        assert found.parts["memory"] == pytest.approx(0.133, abs=0.005)
