"""Every kind of mask, through the Triton kernels, forward and both backward modes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import masks
from flashmark.block_sparse import eager
from flashmark.kernels.block_sparse import configs
from tests.helpers import assert_close
from tests.interpreter.attention_cases import Call, Case, check


def random_bits(*shape: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(20),
    "window-both-sides": masks.sliding_window(9, 12),
    "prefix": masks.prefix(11) | masks.causal(),
    "pinned": masks.pinned(5),
    "dilated": masks.causal() & masks.dilated(3),
    "documents": masks.causal() & masks.documents(torch.arange(70) // 23),
    "sink-and-window": masks.causal() & (masks.sliding_window(16) | masks.prefix(4)),
    "random-bits": masks.dense(random_bits(70, 70)),
    "inverse": ~masks.sliding_window(30, 30),
    "mask-mod": masks.mask_mod(lambda b, h, i, j: (i * 7 + j * 5) % 3 > 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(name, device):
    check(Case(mask=MASKS[name], kv_heads=1), device)


@pytest.mark.parametrize("block", [16, 64, 128, (16, 64), (128, 32), (32, 128)], ids=str)
def test_block_sizes(block, device):
    check(Case(mask=masks.sliding_window(50), block=block, q_len=90, heads=1), device)


def test_runs_of_full_tiles(device):
    """Rows whose full tiles come in several runs, and rows that have none."""
    tiles = random_bits(1, 1, 6, 6, density=0.6, seed=3)
    tiles[..., 2, :] = False
    check(Case(mask=masks.blocks(tiles, 16), block=16, q_len=96, heads=1), device)


@pytest.mark.parametrize("shape", [(33, 100), (100, 33), (1, 40), (40, 1)], ids=str)
def test_fewer_or_more_keys_than_queries(shape, device):
    q_len, kv_len = shape
    check(Case(mask=masks.causal(), q_len=q_len, kv_len=kv_len), device)
    check(Case(mask=masks.sliding_window(20), q_len=q_len, kv_len=kv_len), device)


def test_mask_per_sample_and_head(device):
    mask = masks.dense(random_bits(2, 2, 50, 50))
    check(Case(mask=mask, batch=2, q_len=50), device)


def test_per_head_masks_with_grouped_heads(device):
    """Heads that share keys and values, each with a mask of its own."""
    mask = masks.dense(random_bits(1, 4, 50, 50))
    check(Case(mask=mask, heads=4, kv_heads=2, q_len=50), device)


def test_fully_masked_rows_and_whole_masked_heads(device):
    """They give 0, an lse of -inf, and gradients of 0."""
    visible = random_bits(1, 2, 60, 60)
    visible[:, 1] = False
    visible[:, :, 20:40] = False
    visible[..., 30:] = False
    case = Case(mask=masks.dense(visible), q_len=60)
    check(case, device)
    call = Call(case, device)
    out, lse = call.forward()
    assert (out[:, 1] == 0).all() and (lse[:, 1] == float("-inf")).all()
    assert (out[:, 0, 20:40] == 0).all()
    for deterministic in (True, False):
        grads = call.backward(out, lse, deterministic)
        assert (grads["d query"][:, 1] == 0).all() and (grads["d query"][:, 0, 20:40] == 0).all()
        assert (grads["d key"][:, 1] == 0).all() and (grads["d value"][:, :, 30:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "random-bits"])
def test_dtypes(name, dtype, device):
    check(Case(mask=MASKS[name], dtype=dtype, kv_heads=1), device)


@pytest.mark.parametrize("name", ["none", "causal", "sink-and-window"])
def test_agrees_with_the_eager_backend(name, device):
    call = Call(Case(mask=MASKS[name], kv_heads=1, sinks=True), device)
    out, lse = call.forward()
    eager_out, eager_lse = call.forward(eager)
    assert_close(out, eager_out, 1e-5)
    assert_close(lse, eager_lse, 1e-5)
    grads = call.backward(out, lse, True)
    for key, expected in call.backward(eager_out, eager_lse, True, eager).items():
        assert_close(grads[key], expected, 5e-5, key)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("name", ["causal", "window"])
def test_tiles_of_a_hopper_gpu(name, head_dim, device, monkeypatch):
    """The tile sizes of the pointer form on a GPU give the same results as the small ones of the
    interpreter.
    """
    monkeypatch.setattr(configs, "device_arch", lambda device: 90)
    case = Case(mask=MASKS[name], heads=1, q_len=150, dim=head_dim, block=128)
    with configs.pointer_forms():
        check(dataclasses.replace(case, dtype=torch.float16), device)


def test_a_key_or_value_of_the_future_changes_nothing(device):
    """Bitwise: outputs up to query i do not depend on what comes after."""
    call = Call(Case(mask=masks.causal(), q_len=70), device)
    out, lse = call.forward()
    for poison in (float("nan"), float("inf"), -float("inf"), 1e4):
        call.query[..., 41:, :] = poison
        call.key[..., 41:, :] = poison
        call.value[..., 41:, :] = 1e30
        poisoned_out, poisoned_lse = call.forward()
        assert torch.equal(poisoned_out[..., :41, :], out[..., :41, :])
        assert torch.equal(poisoned_lse[..., :41], lse[..., :41])
