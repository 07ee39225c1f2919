"""Size, sharing, caching and drawing of compiled masks."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers
from tests.masks.watching import LargestOutput


def compiled(mask, q_len=256, kv_len=None, *, batch=1, heads=1, block_size=64):
    return masks.compile_mask(
        mask, batch, heads, q_len, kv_len or q_len, device="cpu", block_size=block_size
    )


@pytest.mark.parametrize(
    ("mask", "distinct"),
    [
        pytest.param(masks.causal() & masks.sliding_window(10_000), 1, id="causal"),
        pytest.param(masks.causal() & masks.sliding_window(128), 2, id="window-128"),
        pytest.param(masks.causal() & masks.sliding_window(100), 3, id="window-100"),
        pytest.param(masks.diagonal(), 1, id="diagonal"),
        pytest.param(masks.sliding_window(128, 128), 2, id="two-sided"),
        pytest.param(~masks.causal() | masks.sliding_window(10_000, 0), 0, id="everything"),
    ],
)
def test_block_multiples_need_few_distinct_partial_tiles(mask, distinct):
    assert len(compiled(mask, 512).tile_bits) == distinct


def test_offset_by_whole_blocks_keeps_one_distinct_causal_tile():
    mask = compiled(masks.causal() & masks.prefix(1_000_000), 256, 512)
    assert len(mask.tile_bits) == 1
    assert mask.density == pytest.approx(sum(i + 257 for i in range(256)) / (256 * 512))


def test_full_tiles_of_a_row_are_one_run():
    mask = compiled(masks.causal() & masks.sliding_window(1000), 2048, block_size=64)
    runs_per_row = mask.rows.run_offsets.diff()
    assert runs_per_row.max() == 1
    assert mask.cols.run_offsets.diff().max() == 1


@pytest.mark.parametrize("name", ["causal", "dense"])
def test_plain_causal_and_dense_are_a_static_kind(name):
    mask = (
        masks.causal() if name == "causal" else masks.dense(torch.ones(130, 130, dtype=torch.bool))
    )
    block_mask = compiled(mask, 130)
    if name == "causal":
        assert block_mask.kind == "causal"
    expected = torch.ones(130, 130, dtype=torch.bool)
    expected = expected.tril() if name == "causal" else expected
    assert torch.equal(block_mask.to_dense()[0, 0], expected)
    assert block_mask.density == pytest.approx(expected.double().mean().item())


SIZES = {"batch": 3, "heads": 4}
IDS = torch.tensor([[0] * 50 + [1] * 50] * 3)


@pytest.mark.parametrize(
    ("mask", "leading"),
    [
        pytest.param(masks.causal(), (1, 1), id="causal"),
        pytest.param(masks.sliding_window(9) & masks.prefix(30), (1, 1), id="position-only"),
        pytest.param(masks.prefix(torch.tensor([1, 2, 3])), (3, 1), id="prefix-per-sample"),
        pytest.param(masks.documents(IDS), (3, 1), id="documents-per-sample"),
        pytest.param(masks.documents(IDS[0]), (1, 1), id="documents-shared"),
        pytest.param(masks.key_padding(torch.tensor([100, 50, 1])), (3, 1), id="key-padding"),
        pytest.param(masks.mask_mod(lambda b, h, q, kv: q >= kv), (1, 1), id="mod-shared"),
        pytest.param(masks.mask_mod(lambda b, h, q, kv: q >= kv + h), (1, 4), id="mod-per-head"),
        pytest.param(masks.mask_mod(lambda b, h, q, kv: q >= kv + b), (3, 1), id="mod-per-sample"),
        pytest.param(
            masks.mask_mod(lambda b, h, q, kv: q >= kv + b * h), (3, 4), id="mod-per-both"
        ),
        pytest.param(
            masks.key_padding(torch.tensor([100, 50, 1]))
            & masks.mask_mod(lambda b, h, q, kv: q >= kv + h),
            (3, 4),
            id="sample-and-head",
        ),
        pytest.param(
            masks.blocks(torch.ones(1, 4, 4, 4, dtype=torch.bool), 32) & masks.causal(),
            (1, 4),
            id="blocks-per-head",
        ),
    ],
)
def test_leading_dimensions_collapse_unless_needed(mask, leading):
    block_mask = compiled(mask, 100, **SIZES, block_size=32)
    assert block_mask.shape == (*leading, 100, 100)
    assert block_mask.to_dense().shape == (*leading, 100, 100)


def test_causal_at_a_million_tokens_is_small_and_quick():
    n = 1_048_576
    with LargestOutput() as largest:
        started = time.perf_counter()
        plain = compiled(masks.causal(), n, block_size=128)
        banded = compiled(masks.causal() & masks.sliding_window(n), n, block_size=128)
        elapsed = time.perf_counter() - started
    assert plain.nbytes < 1_000_000 and banded.nbytes < 1_000_000
    assert plain.density == pytest.approx((n + 1) / (2 * n), abs=0)
    assert banded.density == plain.density
    assert largest.elements * 8 < 80_000_000, "the number of tiles, in int64, would be 500 MB"
    assert elapsed < 60, "the size of an element loop, not of this build"


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(masks.causal() & masks.sliding_window(4096), id="causal-window"),
        pytest.param(masks.causal() & masks.documents(torch.arange(32768) // 5000), id="documents"),
        pytest.param(
            masks.pinned(64) | (masks.causal() & masks.sliding_window(512)), id="sink-window"
        ),
    ],
)
def test_building_at_32k_allocates_nothing_quadratic(mask):
    with LargestOutput() as largest:
        block_mask = compiled(mask, 32768, block_size=128)
    tiles, elements_of_a_tile = 256 * 256, 128 * 128
    # the distinct partial tiles may be evaluated together; nothing comes near 2^30 elements
    assert largest.elements <= max(8 * tiles, 600 * elements_of_a_tile)
    assert block_mask.nbytes < 4_000_000


def test_mask_mod_is_evaluated_a_band_of_tiles_at_a_time():
    with LargestOutput() as largest:
        block_mask = compiled(
            masks.mask_mod(lambda b, h, q, kv: (q - kv).abs() < 100), 8192, block_size=128
        )
    assert largest.elements <= 8192 * 8192 // 4
    assert block_mask.density == pytest.approx(
        (8192 + 2 * sum(8192 - d for d in range(1, 100))) / 8192**2
    )


@pytest.mark.parametrize(
    "combine",
    [
        pytest.param(lambda tiles: tiles, id="alone"),
        pytest.param(lambda tiles: tiles & masks.causal(), id="causal"),
        pytest.param(lambda tiles: masks.sliding_window(40) & tiles & masks.causal(), id="window"),
    ],
)
def test_blocks_and_a_closed_form_compile_without_reading_the_device(combine):
    tiles = torch.rand(1, 2, 8, 8) < 0.4
    # a tensor without values cannot be read: whatever compiles here needs no host sync
    blind = masks.compile_mask(
        combine(masks.blocks(tiles.to("meta"), 32)), 1, 2, 256, 256, device="meta", block_size=32
    )
    assert all(tensor.device.type == "meta" for tensor in blind.tensors())
    mask = compiled(combine(masks.blocks(tiles, 32)), 256, heads=2, block_size=32)
    assert [t.shape for t in mask.tensors()] == [t.shape for t in blind.tensors()]
    expected = tiles.repeat_interleave(32, 2).repeat_interleave(32, 3)
    shape = combine(masks.prefix(256)).to_dense(1, 1, 256, 256)
    assert torch.equal(mask.to_dense(), expected & shape)


def test_more_visible_blocks_than_promised_are_refused():
    tiles = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="max_blocks.*5.*16"):
        compiled(masks.blocks(tiles, 32, max_blocks=5), 128, block_size=32)


def test_max_blocks_bounds_the_buffers_of_a_blocks_mask():
    tiles = torch.eye(16, dtype=torch.bool)
    roomy = compiled(masks.blocks(tiles, 32), 512, block_size=32)
    tight = compiled(masks.blocks(tiles, 32, max_blocks=16), 512, block_size=32)
    assert torch.equal(tight.to_dense(), roomy.to_dense())
    assert tight.nbytes < roomy.nbytes


def attend(mask, n=40, batch=1):
    query, key, value = helpers.qkv(batch, 2, n, 8, grad=False)
    return flashmark.block_sparse_attention(query, key, value, mask, backend="eager")


def test_an_expression_of_positions_is_compiled_once_for_its_sizes(monkeypatch):
    from flashmark.masks import cache

    compiles = []
    compile_mask = cache.compile_mask
    monkeypatch.setattr(
        cache,
        "compile_mask",
        lambda *args, **kw: compiles.append(args) or compile_mask(*args, **kw),
    )
    cache._remembered.cache_clear()
    make = lambda: masks.causal() & (masks.sliding_window(7) | masks.prefix(3))  # noqa: E731
    first = attend(make())
    for mask in (make(), copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        assert torch.equal(attend(mask), first)
    assert len(compiles) == 1
    attend(make(), n=41)
    attend(masks.causal() & (masks.sliding_window(7) | masks.prefix(4)))
    assert len(compiles) == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("composed", [False, True], ids=["alone", "composed"])
def test_a_mask_follows_a_tensor_changed_in_place(dtype, composed):
    ids = torch.zeros(256, dtype=dtype)
    mask = masks.documents(ids)
    mask = mask & ~~masks.sliding_window(1000) if composed else mask
    before = attend(mask, n=256)
    ids[100:] = 1
    after = attend(mask, n=256)
    assert torch.equal(after, attend(masks.documents(ids.clone()), n=256))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["prefix", "key_padding", "padding_bool", "blocks", "dense"])
def test_every_mask_of_tensors_follows_a_change_in_place(kind):
    n = 256
    make, tensor, change = {
        "prefix": (masks.prefix, torch.tensor([n, n]), lambda t: t.fill_(7)),
        "key_padding": (masks.key_padding, torch.tensor([n, n]), lambda t: t.sub_(50)),
        "padding_bool": (
            masks.key_padding,
            torch.ones(2, n).bool(),
            lambda t: t[:, 30:].fill_(False),
        ),
        "blocks": (
            lambda t: masks.blocks(t, 128) & masks.sliding_window(500),
            torch.ones(2, 2).bool(),
            lambda t: t[:, 1].fill_(False),
        ),
        "dense": (masks.dense, torch.ones(n, n).bool(), lambda t: t[:, 5:].fill_(False)),
    }[kind]
    mask = make(tensor)
    query, key, value = helpers.qkv(2, 2, n, 8, grad=False)
    before = attend(mask, n, batch=2)
    change(tensor)
    after = attend(mask, n, batch=2)
    assert torch.equal(after, attend(make(tensor.clone()), n, batch=2))
    assert not torch.equal(after, before)


def test_an_uncompiled_mask_of_small_blocks_can_be_passed():
    tiles = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    out = attend(masks.blocks(tiles, 16) & masks.causal(), n=96)
    dense = tiles.repeat_interleave(16, 0).repeat_interleave(16, 1).tril()
    helpers.assert_close(out, attend(masks.dense(dense), n=96), 1e-6)


def test_an_uncompiled_mask_of_tensors_works_in_inference_mode():
    with torch.inference_mode():
        ids = torch.arange(40) // 10
        out = attend(masks.causal() & masks.documents(ids))
    helpers.assert_close(out, attend(masks.causal() & masks.documents(ids.clone())), 1e-6)


def test_a_mask_first_used_in_inference_mode_serves_training_later():
    mask = masks.causal() & masks.sliding_window(9)
    with torch.inference_mode():
        attend(mask)
    query = helpers.randn(1, 2, 40, 8, grad=True)
    flashmark.block_sparse_attention(query, query, query, mask).sum().backward()
    assert query.grad is not None


def test_compiling_twice_gives_the_same_mask():
    mask = masks.causal() & masks.documents(torch.arange(200) // 60)
    a, b = (compiled(mask, 200, block_size=32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.causal() & masks.sliding_window(50),
        masks.mask_mod(lambda b, h, q, kv: q >= kv + 20 * h),
        masks.prefix(0),
    ],
    ids=["causal", "window", "per-head", "empty"],
)
def test_print_and_repr(mask):
    block_mask = compiled(mask, 200, 300, heads=2, block_size=32)
    text = str(block_mask)
    assert len(text.splitlines()) >= 3 and max(map(len, text.splitlines())) <= 200
    assert "200" in repr(block_mask) and "300" in repr(block_mask) and "\n" not in repr(block_mask)


def test_print_of_a_large_mask_fits_a_terminal():
    text = str(compiled(masks.causal() & masks.sliding_window(1000), 100_000, block_size=128))
    assert len(text.splitlines()) <= 120 and max(map(len, text.splitlines())) <= 200


def test_print_of_opposite_masks_differs():
    lower, upper = (str(compiled(m, 256, block_size=32)) for m in (masks.causal(), ~masks.causal()))
    assert lower != upper


def test_expressions_print_as_they_are_written():
    text = repr(masks.causal() & ~masks.sliding_window(5))
    assert "causal" in text and "&" in text and "~" in text and "sliding_window(5)" in text


def test_plot_returns_axes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = compiled(masks.causal() & masks.sliding_window(50), 200, block_size=32).plot()
    assert isinstance(axes, matplotlib.axes.Axes)
    assert compiled(masks.causal(), 100, heads=2).plot(axes, head=0) is axes
    pyplot.close("all")


@pytest.mark.parametrize("q_len", [1, 3])
def test_decode_shaped_masks(q_len):
    mask = compiled(masks.causal() & masks.sliding_window(20), q_len, 100, block_size=16)
    expected = helpers.causal() & helpers.window(20)
    assert torch.equal(mask.to_dense(), expected.dense(1, 1, q_len, 100))
    assert mask.rows.counts.sum() <= 4


def test_parallel_decoding_mask_is_a_prefix_and_oneself():
    """causal & pinned(p): tril(m mᵀ) over a prefix of p keys, and the diagonal."""
    mask = compiled(masks.causal() & masks.pinned(4), 10, block_size=16).to_dense()[0, 0]
    for i in range(10):
        for j in range(10):
            assert mask[i, j].item() == (j <= i and (j < 4 or j == i))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_mask_that_was_used_have_tensors_of_their_own(copied):
    mask = compiled(masks.causal() & masks.sliding_window(9), 40)
    attention = flashmark.block_sparse_attention
    fresh = pickle.dumps(mask)
    query = helpers.randn(1, 1, 40, 16)
    wanted = attention(query, query, query, mask)
    assert pickle.dumps(mask) == fresh
    twin = copied(mask)
    mask.tile_bits.zero_()
    helpers.assert_identical(attention(query, query, query, twin), wanted)
    assert not torch.equal(attention(query, query, query, mask), wanted)
