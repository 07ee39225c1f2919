"""Tile compaction in C++ gives bit for bit what the PyTorch path gives."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmark import masks, native
from flashmark.masks.block_mask import pack_bits
from tests import helpers
from tests.native.cases import in_pytorch, needs_native  # noqa: F401

pytestmark = needs_native


def random_bool(*shape, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) < density


def compiled(mask, batch, heads, q_len, kv_len, block_size):
    return masks.compile_mask(
        mask, batch, heads, q_len, kv_len, device="cpu", block_size=block_size
    )


def assert_same_mask(actual, expected):
    assert (actual.layout, actual.kind) == (expected.layout, expected.kind)
    names = [f"{form}.{n}" for form in ("rows", "cols") for n in range(6)] + ["tile_bits", "kept"]
    for name, x, y in zip(names, actual.tensors(), expected.tensors(), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert torch.equal(x, y), name


def blocky(q_len, kv_len, seed, leading=(1, 1)):
    """A dense mask with empty, full, repeated and random areas."""
    visible = random_bool(*leading, q_len, kv_len, seed=seed)
    area = random_bool(*leading, -(-q_len // 48), -(-kv_len // 40), density=0.4, seed=seed + 1)
    area = area.repeat_interleave(48, 2).repeat_interleave(40, 3)[..., :q_len, :kv_len]
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return torch.where(area, (i - j) % 16 < 3, visible & (j < kv_len // 2) | (i < q_len // 3))


SIZES = [(1, 1), (1, 17), (17, 1), (64, 64), (127, 129), (130, 65), (200, 31), (256, 384)]


@pytest.mark.parametrize("block_size", [16, 64, 128, (32, 128), (128, 16)], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_dense_masks_compile_to_the_same(in_pytorch, q_len, kv_len, block_size):  # noqa: F811
    mask = masks.dense(blocky(q_len, kv_len, seed=q_len))
    arguments = (mask, 1, 1, q_len, kv_len, block_size)
    assert_same_mask(compiled(*arguments), in_pytorch(lambda: compiled(*arguments)))


@pytest.mark.parametrize("leading", [(2, 1), (1, 3), (2, 3)], ids=["sample", "head", "both"])
@pytest.mark.parametrize("value", ["blocky", "empty", "full", "first-key"])
def test_dense_masks_per_head_and_sample(in_pytorch, leading, value):  # noqa: F811
    visible = torch.zeros(*leading, 150, 170, dtype=torch.bool)
    if value == "blocky":
        visible = blocky(150, 170, 5, leading)
    visible[..., : {"full": 170, "first-key": 1}.get(value, 0)] = True
    arguments = (masks.dense(visible), 2, 3, 150, 170, 64)
    assert_same_mask(compiled(*arguments), in_pytorch(lambda: compiled(*arguments)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "heads-last"])
def test_dense_masks_of_any_strides(in_pytorch, layout):  # noqa: F811
    visible = {
        "transposed": lambda: blocky(100, 150, 0, (2, 3)).mT,
        "sliced": lambda: blocky(300, 400, 0, (2, 3))[:, :, 5:155, 200:300],
        "expanded": lambda: blocky(150, 100, 0).expand(2, 3, 150, 100),
        "heads-last": lambda: random_bool(2, 150, 100, 3).permute(0, 3, 1, 2),
    }[layout]()
    arguments = (masks.dense(visible), 2, 3, 150, 100, 32)
    assert_same_mask(compiled(*arguments), in_pytorch(lambda: compiled(*arguments)))


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda b, h, q, kv: q >= kv, id="causal"),
        pytest.param(lambda b, h, q, kv: (q * 7 + kv * 3) % 11 < 4, id="irregular"),
        pytest.param(lambda b, h, q, kv: (q - kv).abs() <= 20 * (h + 1), id="per-head"),
        pytest.param(lambda b, h, q, kv: (q >= kv) & (kv >= 30 * b), id="per-sample"),
        pytest.param(lambda b, h, q, kv: q < -kv, id="empty"),
    ],
)
@pytest.mark.parametrize("block_size", [16, (64, 32), 128], ids=str)
def test_bands_of_a_mask_mod_compile_to_the_same(in_pytorch, fn, block_size):  # noqa: F811
    mask = masks.mask_mod(fn)
    for arguments in (
        (mask, 2, 3, 190, 210, block_size),
        (mask & masks.dense(blocky(190, 210, 3)), 2, 3, 190, 210, block_size),
    ):
        expected = in_pytorch(functools.partial(compiled, *arguments))
        assert_same_mask(compiled(*arguments), expected)


@pytest.mark.parametrize("leading", [(1, 1), (1, 4), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("closed", [None, masks.causal(), masks.sliding_window(70, 20)], ids=repr)
def test_block_maps_compile_to_the_same(in_pytorch, leading, density, closed):  # noqa: F811
    mask = masks.blocks(random_bool(*leading, 5, 7, density=density), 64)
    mask = mask if closed is None else mask & closed
    arguments = (mask, 3, 4, 300, 430, 32)
    assert_same_mask(compiled(*arguments), in_pytorch(lambda: compiled(*arguments)))


def test_block_maps_fill_no_more_than_their_capacity(in_pytorch):  # noqa: F811
    chosen = torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    chosen[..., :3] = True
    arguments = (2, 2, 96, 96, 16)
    exact = masks.blocks(chosen, 16, max_blocks=36)
    result = compiled(exact, *arguments)
    assert result.rows.partials.shape == (36, 2)
    assert_same_mask(result, in_pytorch(lambda: compiled(exact, *arguments)))
    with pytest.raises(ValueError, match="max_blocks: expected at most 35 visible tiles, got 36"):
        compiled(masks.blocks(chosen, 16, max_blocks=35), *arguments)


def test_a_block_map_compiled_twice_shares_nothing_that_depends_on_the_map():
    for seed in range(3):
        chosen = random_bool(4, 4, seed=seed)
        dense = compiled(masks.blocks(chosen, 32), 1, 1, 120, 128, 32).to_dense()[0, 0]
        wanted = chosen.repeat_interleave(32, 0).repeat_interleave(32, 1)[:120]
        assert torch.equal(dense, wanted)


def test_a_block_map_compiled_in_inference_mode_first_still_trains():
    from flashmark import block_sparse_attention

    chosen, x = torch.ones(3, 3, dtype=torch.bool), helpers.randn(1, 1, 41, 8)
    with torch.inference_mode():
        block_sparse_attention(x, x, x, masks.blocks(chosen, 16))
    x.requires_grad_()
    block_sparse_attention(x, x, x, masks.blocks(chosen, 16)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(in_pytorch, threads):  # noqa: F811
    mask = masks.dense(blocky(400, 300, 7, (2, 2)))
    arguments = (mask, 2, 2, 400, 300, 32)
    expected = in_pytorch(lambda: compiled(*arguments))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_mask(compiled(*arguments), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block_kv", [1, 8, 31, 32, 33, 100, 128])
def test_packed_tiles_hold_the_bits_of_their_elements(block_kv):
    elements = random_bool(9, 16, block_kv)
    bits, counts = native.pack_tiles(elements)
    assert torch.equal(bits, pack_bits(elements))
    assert torch.equal(counts, elements.sum((1, 2)))


def test_any_byte_that_is_not_zero_is_visible():
    bytes = torch.tensor([0, 1, 2, 128, 255], dtype=torch.uint8).repeat(7)[:32].view(1, 1, 32)
    bits, counts = native.pack_tiles(bytes.view(torch.bool))
    assert torch.equal(bits, pack_bits(bytes != 0))
    assert counts.item() == int((bytes != 0).sum())


@pytest.mark.parametrize("tiles", [0, 1, 2, 300])
def test_distinct_tiles_are_the_sorted_rows(tiles):
    few = random_bool(7, 2, 40, seed=1)
    chosen = torch.randint(7, (tiles,), generator=torch.Generator().manual_seed(0))
    bits, counts = native.pack_tiles(few[chosen])
    classes, tile_bits, visible, found = native.distinct_tiles(bits, counts, 80)
    wanted, inverse = torch.unique(bits, dim=0, return_inverse=True)
    assert torch.equal(tile_bits, wanted)
    assert torch.equal(classes, inverse.int())
    assert found.item() == len(wanted) == len(visible)
    assert torch.equal(visible[classes.long()], counts)


def test_tiles_that_differ_in_one_bit_are_distinct():
    tiles = torch.zeros(129, 16, 8, dtype=torch.bool)
    tiles[torch.arange(128), torch.arange(128) // 8, torch.arange(128) % 8] = True
    bits, counts = native.pack_tiles(tiles)
    classes, tile_bits, _, found = native.distinct_tiles(bits, counts, 128, max_tiles=130)
    assert found.item() == 128
    assert classes[-1] == -2
    assert sorted(classes[:-1].tolist()) == list(range(128))
    assert torch.equal(tile_bits[classes[:-1].long()], bits[:-1])
    assert not tile_bits[128:].any()
    with pytest.raises(ValueError, match="max_tiles: expected at most 127 distinct tiles, got 128"):
        native.distinct_tiles(bits, counts, 128, max_tiles=127)


def test_entries_beyond_the_capacity_are_left_out():
    classes = torch.tensor([[-1, -2, -1, 0, 0, 0]]).int().view(1, 1, 1, 6)
    everywhere = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    area = torch.tensor([0, 256, 5])
    rows, _, kept, taken = native.tile_lists(everywhere, classes, area, capacity=2)
    assert rows[1].tolist() == [[0, 1], [2, 1]]
    assert rows[3].tolist() == [[3, 0], [4, 0]]
    assert (kept.item(), taken.item()) == (2 * 256 + 15, 5)


def test_fake_tensors_have_the_real_shapes():
    visible = random_bool(2, 3, 40, 70)
    classes = torch.zeros(2, 3, 4, 5, dtype=torch.int32)
    area, seen = torch.tensor([0, 9, 1]), torch.ones(2, 3, 4, 5, dtype=torch.bool)
    real = [*native.pack_dense(visible, 16, 32)]
    real += [*native.distinct_tiles(*real, 512, max_tiles=60)]
    real += torch.utils._pytree.tree_leaves(native.tile_lists(seen, classes, area, capacity=50))
    with FakeTensorMode() as mode:
        visible, classes, area, seen = map(mode.from_tensor, (visible, classes, area, seen))
        fake = [*native.pack_dense(visible, 16, 32)]
        fake += [*torch.ops.flashmark_native.distinct_tiles(*fake, 512, 60)]
        fake += torch.utils._pytree.tree_leaves(native.tile_lists(seen, classes, area, capacity=50))
    for x, y in zip(fake, real, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.pack_tiles(torch.ones(2, 3, 4)), "elements: expected a bool"),
        (lambda: native.pack_dense(random_bool(3, 4), 16, 16), "visible: expected a bool"),
        (
            lambda: native.distinct_tiles(torch.ones(2, 3, 4), torch.ones(2).long(), 9),
            "bits: expected int32",
        ),
        (
            lambda: native.tile_lists(
                random_bool(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(2).long()
            ),
            "classes: expected int32",
        ),
    ],
    ids=["elements", "visible", "bits", "classes"],
)
def test_wrong_tensors_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
