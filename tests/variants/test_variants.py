"""Every member of the landmark family against its dense definition, and what all promise."""

from __future__ import annotations

import functools
import io
import itertools

import pytest
import torch

import flashmark
from flashmark import masks, variants
from flashmark.variants.segments import segment_masks
from tests import helpers
from tests.nystrom.cases import BACKENDS
from tests.variants.cases import CAUSAL, EVERY

pytestmark = pytest.mark.filterwarnings("ignore:untied landmarks")

SHAPES = {  # batch, heads, kv_heads, N, D, Dv
    "one-token": (1, 2, 1, 1, 8, 4),
    "two-tokens": (2, 1, 1, 2, 8, 8),
    "grouped": (2, 4, 2, 45, 16, 5),
    "odd": (1, 2, 2, 67, 7, 9),
}


def inputs(shape, *, dtype=torch.float32, layout="contiguous"):
    batch, heads, kv_heads, n, dim, v_dim = shape
    return helpers.qkv(
        batch, heads, n, dim, kv_heads=kv_heads, v_dim=v_dim, dtype=dtype, layout=layout
    )


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        ("one-token", "auto"),
        ("two-tokens", "auto"),
        *itertools.product(["grouped", "odd"], BACKENDS),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_outputs_and_gradients_within_budget_of_the_definition(name, shape, backend):
    batch, _, kv_heads, n, *_ = SHAPES[shape]
    member = EVERY[name]
    options = member.keywords(batch, n, kv_heads)
    report = flashmark.check(member.op, *inputs(SHAPES[shape]), **options, backend=backend)
    assert report, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in EVERY if n != "first-k-mass"])  # plain: NaN in half
def test_half_precision_within_budget(name, dtype):
    batch, _, kv_heads, n, *_ = SHAPES["grouped"]
    options = EVERY[name].keywords(batch, n, kv_heads)
    report = flashmark.check(EVERY[name].op, *inputs(SHAPES["grouped"], dtype=dtype), **options)
    assert report, report


@pytest.mark.parametrize("name", EVERY)
def test_float64(name):
    leaves = inputs(SHAPES["grouped"], dtype=torch.float64)
    member, options = EVERY[name], EVERY[name].keywords(2, 45, 2)
    out = member.op(*leaves, **options)
    expected = getattr(flashmark.reference, member.op.__name__)(*leaves, **options)
    helpers.assert_close(out, expected, 1e-11)
    d_out = helpers.randn(*out.shape, seed=9, dtype=torch.float64)
    for found, exact in zip(
        torch.autograd.grad(out, leaves, d_out),
        torch.autograd.grad(expected, leaves, d_out),
        strict=True,
    ):
        helpers.assert_close(found, exact, 1e-10)


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
@pytest.mark.parametrize("name", EVERY)
def test_strides_do_not_matter(name, layout):
    op = EVERY[name].bound(2, 45, 2)
    plain, strided = (op(*inputs(SHAPES["grouped"], layout=x)) for x in ("contiguous", layout))
    helpers.assert_close(strided, plain, 1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_no_sample(name):
    query, key, value = (x[:0] for x in inputs(SHAPES["grouped"]))
    out = EVERY[name].bound(0, 45, 2)(query, key, value)
    assert out.shape == (0, 4, 45, 5)


@pytest.mark.parametrize("name", EVERY)
def test_no_token(name):
    query, key, value = (x[:, :, :0] for x in inputs(SHAPES["grouped"]))
    out = EVERY[name].bound(2, 0, 2)(query, key, value)
    assert out.shape == (2, 4, 0, 5)


@pytest.mark.parametrize("name", [*CAUSAL, "nystromformer-tikhonov"])
def test_a_constant_value_comes_back(name):
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    options = EVERY[name].keywords(2, 45, 2)
    value = torch.ones_like(value) * torch.arange(5.0)
    out = EVERY[name].op(query, key, value, **options)
    expected = value[:, :1].expand(2, 4, 45, 5)
    seen = options.get("key_mask", torch.ones(2, 45, dtype=torch.bool))
    helpers.assert_close(out, expected * seen[:, None, :, None], 1e-5)


@pytest.mark.parametrize("name", [n for n in EVERY if "padded" in n or "untied" in n])
def test_hidden_tokens_may_hold_anything(name):
    options = EVERY[name].keywords(2, 45, 2)
    if "pool_padding" in options or name.startswith("nystromformer"):
        options["pool_padding"] = False
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    hidden = ~options["key_mask"][:, None, :, None]
    clean = EVERY[name].op(query, key, value, **options)
    poisoned = [x.masked_fill(hidden, torch.nan) for x in (key, value)]
    helpers.assert_identical(EVERY[name].op(query, *poisoned, **options), clean)


@pytest.mark.parametrize("name", EVERY)
def test_all_keys_hidden_gives_zeros_and_no_gradient(name):
    leaves = inputs(SHAPES["grouped"])
    options = EVERY[name].keywords(2, 45, 2) | {"key_mask": torch.zeros(2, 45, dtype=torch.bool)}
    options.pop("conv_weight", None)
    out = EVERY[name].op(*leaves, **options)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), leaves, materialize_grads=True):
        assert not grad.any()


# not Newton-Schulz, which does not converge there, nor "mass", whose denominator may vanish
@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "first-k-mass"])
def test_huge_scores_stay_finite(name):
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    leaves = [x.requires_grad_() for x in (100 * query, 100 * key, value)]
    options = EVERY[name].keywords(2, 45, 2)
    out = EVERY[name].op(*leaves, **options)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_samples_do_not_depend_on_each_other(name):
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    options = EVERY[name].keywords(2, 45, 2)
    both = EVERY[name].op(query, key, value, **options)
    moved = 0.0
    for b in range(2):
        own = options | (
            {"key_mask": options["key_mask"][b, None]} if "key_mask" in options else {}
        )
        alone = EVERY[name].op(*(x[b, None] for x in (query, key, value)), **own)
        moved = max(moved, helpers.relative_error(alone, both[b, None]))
    assert (moved > 1e-5) == (options.get("inverse") == "original")


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("normalize", ["landmark", "mass"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_to_sequence_within_budget(joint, normalize, backend):
    source = helpers.qkv(2, 4, 30, 16, kv_heads=2, v_dim=5, seed=1)
    target = helpers.qkv(2, 4, 21, 16, kv_heads=2, v_dim=5, seed=2)
    landmarks = helpers.randn(2, 6, 16, seed=3, grad=True)
    scale = 0.25 if normalize == "landmark" else 0.08
    report = flashmark.check(
        variants.sequence_to_sequence_attention, source, target, landmarks, joint=joint,
        scale=scale, normalize=normalize, source_mask=masks_of(30),
        target_mask=masks_of(21), backend=backend,
    )  # fmt: skip
    assert report, report


def masks_of(n: int) -> torch.Tensor:
    return torch.stack([torch.arange(n) >= 3, torch.arange(n) < n - 4])


def test_the_target_may_be_decoded_token_by_token_from_the_source():
    source = [x.detach() for x in helpers.qkv(1, 2, 30, 16, seed=1)]
    target = [x.detach() for x in helpers.qkv(1, 2, 9, 16, seed=2)]
    landmarks = flashmark.init_landmarks(2, 6, 16)
    whole = variants.sequence_to_sequence_attention(source, target, landmarks, joint=True)
    out, state = variants.source_attention(*source, landmarks)
    helpers.assert_identical(out, whole.source)
    for t in range(9):
        token = [x[:, :, t : t + 1] for x in target]
        out, state = variants.target_attention(*token, landmarks, state=state)
        helpers.assert_close(out, whole.target[:, :, t : t + 1], 1e-5)


def test_cross_attention_reads_a_source_of_any_length_from_its_state():
    landmarks = flashmark.init_landmarks(2, 6, 16)
    query = helpers.randn(1, 4, 7, 16, seed=9)
    for n in (1, 50):
        source = [x.detach() for x in helpers.qkv(1, 4, n, 16, kv_heads=2, v_dim=3)]
        _, state = variants.source_attention(*source, landmarks)
        expected = flashmark.nystrom_attention(query, *source[1:], landmarks, is_causal=False)
        helpers.assert_close(variants.cross_attention(query, state, landmarks), expected, 1e-6)


@pytest.mark.parametrize("segment", [1, 3, 8])
def test_segments_of_equal_keys_are_exact_attention(segment):
    query, key, value = (
        x.detach() for x in helpers.qkv(1, 4, 40, 8, kv_heads=2, dtype=torch.float64)
    )
    key = key[:, :, ::segment].repeat_interleave(segment, dim=2)[:, :, :40]
    exact = flashmark.block_sparse_attention(query / 4, key, value, masks.causal())
    out = variants.segment_attention(query / 4, key, value, segment=segment, jitter=1e-14)
    helpers.assert_close(out, exact, 1e-8)


def test_one_segment_is_exact_attention():
    query, key, value = (x.detach() for x in helpers.qkv(1, 4, 40, 8, kv_heads=2))
    exact = flashmark.block_sparse_attention(query, key, value, masks.causal())
    out = variants.segment_attention(query, key, value, segment=40)
    helpers.assert_close(out, exact, 1e-6)


def test_values_as_wide_as_the_operators_allow():
    leaves = helpers.qkv(1, 1, 40, 8, v_dim=256)
    report = flashmark.check(variants.segment_attention, *leaves, segment=16)
    assert report, report


def test_rows_before_k_are_exact_and_the_keys_themselves_are_landmarks():
    query, key, value = (x.detach() for x in helpers.qkv(1, 4, 40, 8, kv_heads=2))
    out = variants.first_k_attention(query, key, value, first=12)
    exact = flashmark.block_sparse_attention(query, key, value, masks.causal())
    rest = flashmark.nystrom_attention(query, key, value, key[:, :, :12])
    helpers.assert_close(out[:, :, :12], exact[:, :, :12], 1e-6)
    helpers.assert_close(out[:, :, 12:], rest[:, :, 12:], 1e-5)
    longer = variants.first_k_attention(query, key, value, first=40, num_landmarks=3)
    helpers.assert_close(longer, exact, 1e-6)


def test_a_short_sequence_gets_exact_attention_from_nystromformer():
    leaves = [x.detach() for x in helpers.qkv(1, 4, 12, 8, kv_heads=2)]
    exact = flashmark.block_sparse_attention(*leaves)
    out = variants.nystromformer_attention(*leaves, num_landmarks=12)
    helpers.assert_close(out, exact, 1e-6)


@pytest.mark.parametrize("is_causal", [False, True], ids=["two-sided", "one-sided"])
def test_the_convolution_residual_by_shifts(is_causal):
    value = helpers.randn(2, 3, 11, 4, dtype=torch.float64)
    weight = helpers.randn(3, 5, dtype=torch.float64, seed=1)
    out = variants.convolution_residual(value, weight, is_causal=is_causal)
    expected = torch.zeros_like(value)
    for i in range(11):
        for tap in range(5):
            j = i + tap - (4 if is_causal else 2)
            if 0 <= j < 11:
                expected[:, :, i] += weight[:, tap, None] * value[:, :, j]
    helpers.assert_close(out, expected, 1e-12)
    same = variants.convolution_residual(value, weight[:, None, :, None], is_causal=is_causal)
    helpers.assert_identical(same, out)


def test_backends_that_cannot_run_are_named():
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    for name in ("segment", "first-k", "nystromformer"):
        with pytest.raises(flashmark.BackendUnavailable):
            EVERY[name].bound(2, 45, 2, backend="triton")(query, key, value)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_is_the_same_as_inputs_of_its_dtype(name):
    leaves = [x.detach() for x in inputs(SHAPES["grouped"])]
    op = EVERY[name].bound(2, 45, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(*leaves)
    assert out.dtype == torch.bfloat16
    helpers.assert_close(out, op(*(x.bfloat16() for x in leaves)), 1e-2)


@pytest.mark.parametrize("sizes", [[1] * 45, [13, 32], [9, 1, 0, 20, 15], [40, 5]], ids=str)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name.startswith("first-k")])
def test_first_k_in_parts_is_first_k_at_once(name, sizes):
    inputs_at_once = inputs(SHAPES["grouped"], dtype=torch.float64)
    options = {k: x for k, x in EVERY[name].options.items() if k != "padded"}
    whole = variants.first_k_attention(*inputs_at_once, **options)
    state, parts = None, []
    for part in zip(*(x.split(sizes, 2) for x in inputs_at_once), strict=True):
        out, state = variants.first_k_attention(*part, **options, state=state, return_state=True)
        parts.append(out)
    helpers.assert_close(torch.cat(parts, 2), whole, 1e-9)
    d_out = helpers.randn(*whole.shape, seed=5, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(torch.cat(parts, 2), inputs_at_once, d_out),
        torch.autograd.grad(whole, inputs_at_once, d_out),
        strict=True,
    ):
        helpers.assert_close(a, b, 1e-8)


def test_a_state_of_first_k_is_saved_loaded_and_checked():
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    attend = functools.partial(variants.first_k_attention, query, key, value, first=13)
    _, state = attend(return_state=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    helpers.assert_identical(attend(state=loaded), attend(state=state))
    for options, words in (
        ({"first": 12, "state": state}, "state: expected one made with first=12, got 13 first"),
        ({"first": 14, "state": state}, "state: expected one made with first=14, got 13 first"),
        ({"state": state, "key_mask": torch.ones(2, 45).bool()}, "key_mask: expected None with a"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(**options)
    with pytest.raises(TypeError, match="state: expected a FirstKState, got tuple"):
        attend(state=(1, 2))


def in_pieces(inputs_at_once, sizes, **options):
    state, parts = None, []
    for piece in zip(*(x.split(sizes, 2) for x in inputs_at_once), strict=True):
        out, state = variants.segment_attention(*piece, **options, state=state, return_state=True)
        parts.append(out)
    return torch.cat(parts, 2), state


@pytest.mark.parametrize("segment", [1, 4, 7])
def test_segments_cut_at_every_position_are_one_call(segment):
    leaves = [
        x.detach() for x in helpers.qkv(2, 4, 17, 8, kv_heads=2, v_dim=5, dtype=torch.float64)
    ]
    whole = variants.segment_attention(*leaves, segment=segment)
    for cut in range(18):
        out, _ = in_pieces(leaves, [cut, 17 - cut], segment=segment)
        helpers.assert_close(out, whole, 1e-9, f"cut at {cut}")


@pytest.mark.parametrize("sizes", [[1] * 45, [13, 32], [9, 1, 0, 20, 15], [40, 5]], ids=str)
def test_segments_in_pieces_have_the_gradients_of_one_call(sizes):
    leaves = inputs(SHAPES["grouped"], dtype=torch.float64)
    whole = variants.segment_attention(*leaves, segment=7)
    out, _ = in_pieces(leaves, sizes, segment=7)
    helpers.assert_close(out, whole, 1e-9)
    d_out = helpers.randn(*whole.shape, seed=5, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(out, leaves, d_out),
        torch.autograd.grad(whole, leaves, d_out),
        strict=True,
    ):
        helpers.assert_close(a, b, 1e-8)


def test_after_a_substitution_that_overflows_pieces_are_still_one_call():
    """Tokens that do not read themselves: what follows the first infinity is left out, in both."""
    _, key, value = (x.detach() for x in helpers.qkv(1, 1, 24, 4, dtype=torch.float32))
    leaves, options = (-20 * key, 20 * key, 1e4 * value), {"segment": 2, "jitter": 1e-36}
    whole, once = in_pieces(leaves, [24], **options)
    out, state = in_pieces(leaves, [5] + [1] * 19, **options)
    assert once.overflowed.all() and state.overflowed.all()
    assert out.isfinite().all()
    helpers.assert_close(out, whole, 1e-5)


def test_a_later_call_keeps_every_bit_of_its_past():
    leaves = [x.detach() for x in helpers.qkv(1, 4, 45, 8, kv_heads=2)]
    _, state = in_pieces([x[:, :, :10] for x in leaves], [10], segment=7)
    op = functools.partial(variants.segment_attention, segment=7, state=state)
    names = "query", "key", "value"
    later = {name: x[:, :, 10:] for name, x in zip(names, leaves, strict=True)}
    report = flashmark.check_causality(op, positions=(3, 4, 17), **later)
    assert report, report


def test_a_state_of_segments_is_saved_loaded_and_checked():
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"]))
    attend = functools.partial(variants.segment_attention, query, key, value, segment=7)
    _, state = attend(return_state=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    helpers.assert_identical(attend(state=loaded), attend(state=state))
    for options, words in (
        ({"segment": 8, "state": state}, "state: expected one made with segment=8, got 6 segm"),
        ({"state": state._replace(value=state.value[:1])}, "state.value: expected shape"),
        ({"state": state, "key_mask": torch.ones(2, 45).bool()}, "key_mask: expected None with a"),
        ({"return_state": True, "key_mask": torch.ones(2, 45).bool()}, "key_mask: expected None"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(**options)
    with pytest.raises(TypeError, match="state.key: expected torch.float32, got torch.float64"):
        attend(state=state._replace(key=state.key.double()))
    with pytest.raises(TypeError, match="state: expected a SegmentState, got tuple"):
        attend(state=(1, 2))


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_padded_sample_attends_as_it_does_alone(name, side):
    """Whatever stands in the padding: the first tokens and the segments are its own."""
    query, key, value = (x.detach() for x in inputs(SHAPES["grouped"], dtype=torch.float64))
    key_mask = torch.ones(2, 45, dtype=torch.bool)
    key_mask[1, {"left": slice(0, 9), "right": slice(30, 45), "holes": slice(2, 40, 3)}[side]] = 0
    options = {name: x for name, x in EVERY[name].options.items() if name != "padded"}
    poisoned = [x.masked_fill(~key_mask[:, None, :, None], torch.nan) for x in (query, key, value)]
    out = EVERY[name].op(*poisoned, **options, key_mask=key_mask)
    assert not out.mT[~key_mask[:, None, None].expand_as(out.mT)].any()
    for row in range(2):
        own = (x[row : row + 1, :, key_mask[row]] for x in (query, key, value))
        helpers.assert_close(out[row, :, key_mask[row]], EVERY[name].op(*own, **options)[0], 1e-9)


@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_masks_between_tokens_and_segments(size):
    i = torch.arange(300)
    segment = torch.arange(-(-300 // size))
    of_token = i // size
    own = (of_token[:, None] == of_token) & (i[:, None] >= i)
    dense = {
        "own": own,
        "finished": segment < of_token[:, None],
        "so_far": of_token <= segment[:, None],
    }
    for name, mask in segment_masks(size)._asdict().items():
        q_len, kv_len = dense[name].shape
        compiled = masks.compile_mask(mask, 1, 1, q_len, kv_len, device="cpu", block_size=32)
        assert torch.equal(compiled.to_dense()[0, 0], dense[name]), name


@pytest.mark.parametrize("name", ["segment-odd"])
def test_compiles_into_one_graph_for_any_length(name):
    torch.compiler.reset()
    op = EVERY[name].bound(1, 30, 2)
    compiled = torch.compile(op, fullgraph=True, backend="eager")
    for length in (30, 41, 53):  # from the second on, lengths are symbols
        leaves = helpers.qkv(1, 2, length, 8)
        helpers.assert_close(compiled(*leaves), op(*leaves), 1e-6)
