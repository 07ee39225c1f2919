"""Routed attention in plain PyTorch against the dense definition in float64, and what it promises.

Everything runs with products of all keys and with gathered keys, which are two ways to the same.
"""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import reference
from flashmark.masks import causal
from flashmark.routed import eager, mass
from tests import helpers

SIZE = 4
attention = functools.partial(flashmark.routed_attention, backend="eager", block_size=SIZE)
chosen_attention = functools.partial(
    flashmark.block_topk_attention, backend="eager", block_size=SIZE
)
block_scores = functools.partial(flashmark.block_scores, backend="eager", block_size=SIZE)


@pytest.fixture(params=["all keys", "gathered keys"], autouse=True)
def products(request, monkeypatch):
    for module in (eager, mass):
        monkeypatch.setattr(module, "DENSE", 10**6 if request.param == "all keys" else 0)


@pytest.fixture(autouse=True, params=[2**22, 300], ids=["one tile", "tiles"])
def tiles(request, monkeypatch):
    for module in (eager, mass):
        monkeypatch.setattr(module, "TILE_ELEMENTS", request.param)


def cu(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def inputs(batch=2, heads=4, kv_heads=2, q_len=37, kv_len=37, dim=8, v_dim=6, **options):
    tensors = helpers.qkv(
        batch, heads, q_len, dim, kv_heads=kv_heads, kv_len=kv_len, v_dim=v_dim, **options
    )
    return dict(zip(("query", "key", "value"), tensors, strict=True))


def landmarks(kv_heads=2, count=3, dim=8, **options):
    return helpers.randn(kv_heads, count, dim, seed=7, **options)


def holes(batch: int, kv_len: int) -> torch.Tensor:
    return torch.rand(batch, kv_len, generator=torch.Generator().manual_seed(2)) > 0.3


CALLS = {
    "plain": lambda: (inputs(), {}),
    "mean": lambda: (inputs(), {"landmarks": None}),
    "near 0": lambda: (inputs(), {"near": 0, "top_k": 3}),
    "near 3": lambda: (inputs(), {"near": 3, "top_k": 1}),
    "top_k 0": lambda: (inputs(), {"top_k": 0}),
    "top_k all": lambda: (inputs(), {"top_k": 100}),
    "one head": lambda: (inputs(heads=1, kv_heads=1), {"landmarks": landmarks(1)}),
    "of a batch": lambda: (inputs(), {"landmarks": helpers.randn(2, 2, 3, 8, seed=7)}),
    "softcap": lambda: (inputs(), {"softcap": 1.5, "scale": 0.7}),
    "sinks": lambda: (inputs() | {"sinks": helpers.randn(4, seed=9, grad=True)}, {}),
    "last queries": lambda: (inputs(q_len=5), {}),
    "more queries than keys": lambda: (inputs(kv_len=13), {}),
    "offsets and lengths": lambda: (
        inputs(q_len=9),
        {"query_offset": torch.tensor([3, 25]), "kv_lengths": torch.tensor([12, 34])},
    ),
    "no keys in one": lambda: (inputs(), {"kv_lengths": torch.tensor([30, 0])}),
    "padding": lambda: (inputs(), {"key_mask": holes(2, 37)}),
    "padding and lengths": lambda: (
        inputs(), {"key_mask": holes(2, 37), "kv_lengths": torch.tensor([30, 21])},
    ),
    "packed": lambda: (inputs(batch=1, q_len=40, kv_len=40), {"cu_seqlens": cu(0, 7, 7, 29, 40)}),
    "packed and padding": lambda: (
        inputs(batch=1, q_len=40, kv_len=40),
        {"cu_seqlens": cu(0, 7, 28, 40), "key_mask": holes(1, 40)},
    ),
    "one token": lambda: (inputs(q_len=1, kv_len=1), {}),
    "shorter than a block": lambda: (inputs(q_len=3, kv_len=3), {}),
    "a block of one": lambda: (inputs(q_len=9, kv_len=9), {"block_size": 1}),
    "no queries": lambda: (inputs(q_len=0), {}),
    "no samples": lambda: (inputs(batch=0), {}),
    "stride": lambda: (inputs(layout="gaps"), {}),
    "heads last": lambda: (inputs(layout="bnhd"), {}),
}  # fmt: skip


def call(name: str, dtype: torch.dtype):
    """Tensors that get gradients, and the other arguments."""
    tensors, options = CALLS[name]()
    options = {"landmarks": landmarks(), "top_k": 2} | options
    tensors = {key: x.detach().to(dtype).requires_grad_() for key, x in tensors.items()}
    return tensors, {
        key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in options.items()
    }


def results(op, tensors: dict, options: dict) -> dict[str, torch.Tensor]:
    out = op(**tensors, **options)
    grads = torch.autograd.grad(out, list(tensors.values()), helpers.randn(*out.shape).to(out))
    return {"out": out} | {f"d {key}": x for key, x in zip(tensors, grads, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, dtype):
    tensors, options = call(name, dtype)
    wide_tensors, wide = call(name, torch.float64)
    found = results(attention, tensors, options)
    wanted = results(
        functools.partial(reference.routed_attention, block_size=SIZE), wide_tensors, wide
    )
    for key, expected in wanted.items():
        helpers.assert_close(
            found[key], expected, 1e-13 if dtype == torch.float64 else 2e-5, f"{name}: {key}"
        )


@pytest.mark.parametrize("name", ["plain", "sinks", "packed", "offsets and lengths", "softcap"])
def test_gradients_and_those_of_the_denominator_by_differences(name):
    tensors, options = call(name, torch.float64)
    indices = attention(**tensors, **options, return_routing=True)[1].indices
    options = {k: v for k, v in options.items() if k not in ("landmarks", "top_k")}

    def run(*given):
        given = dict(zip(tensors, given, strict=True))
        out, lse = chosen_attention(**given, indices=indices, near=1, **options, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "mean", "padding", "packed", "near 0", "of a batch"])
def test_scores_and_their_gradients_are_those_of_the_definition(name):
    tensors, options = call(name, torch.float64)
    given = {key: tensors[key] for key in ("query", "key")}
    options.pop("top_k")
    found = block_scores(**given, **options)
    expected = reference.block_scores(**given, **options, block_size=SIZE)
    helpers.assert_close(found, expected, 1e-13)
    finite = expected.detach() > float("-inf")
    for a, b in zip(*(torch.autograd.grad(x[finite].sin().sum(), list(given.values()))
                      for x in (found, expected)), strict=True):  # fmt: skip
        helpers.assert_close(a, b, 1e-12)


@pytest.mark.parametrize("name", ["plain", "mean", "padding", "packed"])
def test_scores_are_the_logs_of_probabilities(name):
    tensors, options = call(name, torch.float64)
    options.pop("top_k")
    shares = block_scores(tensors["query"], tensors["key"], **options).exp()
    there = (shares > 0.0).any(-1)
    assert there.any() and not there[:, :, 0].any()
    helpers.assert_close(shares.sum(-1), there.double(), 1e-13)


def test_where_each_landmark_holds_one_key_the_router_expects_what_attention_finds():
    """Keys far apart, each by a landmark of its own: the share among the chosen blocks is exact."""
    key = 40.0 * torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)
    query = helpers.randn(1, 4, 12, 12, seed=2).double() / 10.0
    given = {"top_k": 2, "near": 0, "scale": 1.0, "return_routing": True}
    routing = attention(query, key, key, key[0], **given)[1]
    share = routing.mass / routing.mass.sum(-1, keepdim=True)
    there = (routing.indices >= 0).all(-1)
    helpers.assert_close(routing.log_probs.exp()[there], share[there], 1e-12)


@pytest.mark.parametrize("name", ["plain", "packed", "padding", "softcap", "last queries"])
def test_mass_is_the_share_of_the_attention_on_each_block(name):
    tensors, options = call(name, torch.float64)
    out, routing = attention(**tensors, **options, near=0, return_routing=True)
    bounds = options.get("cu_seqlens", cu(0, tensors["key"].shape[2])).tolist()
    tokens = tensors["key"].shape[2]
    first = torch.zeros(tokens, dtype=torch.int64)
    for start, end in zip(bounds, bounds[1:], strict=False):
        first[start:end] = start
    block = (torch.arange(tokens) - first) // SIZE
    # values that tell where a key stands show what share of the attention it gets
    eye = torch.eye(tokens, dtype=torch.float64)
    ones = {k: v for k, v in tensors.items() if k != "value"}
    ones["value"] = eye.expand(*tensors["key"].shape[:2], -1, -1)
    options = {k: v for k, v in options.items() if k not in ("landmarks", "top_k")}
    shares = chosen_attention(**ones, indices=routing.indices, **options).detach()
    shares = shares.unflatten(1, (2, -1)).mean(2)  # (B, Hkv, Nq, Nk)
    own = first[tokens - tensors["query"].shape[2] :]
    for n in range(routing.indices.shape[3]):
        at = routing.indices[..., n, None]
        inside = (at >= 0) & (block == at) & (first == own[:, None])
        helpers.assert_close(routing.mass[..., n], (shares * inside).sum(-1), 1e-12)


@pytest.mark.parametrize("near", [0, 1])
def test_all_blocks_are_exact_causal_attention(near):
    tensors = inputs()
    out = attention(**tensors, near=near, top_k=9)
    expected = flashmark.block_sparse_attention(*tensors.values(), causal())
    helpers.assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 17, 36])
def test_later_tokens_change_no_bit(cut):
    before, after = inputs(), inputs(seed=5)
    for name in before:
        with torch.no_grad():
            after[name][:, :, :cut] = before[name][:, :, :cut]
    found = [
        attention(**x, landmarks=landmarks(), top_k=2, return_routing=True) for x in (before, after)
    ]
    helpers.assert_identical(found[0][0][:, :, :cut], found[1][0][:, :, :cut])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a[:, :, :cut], b[:, :, :cut])


def test_blocks_without_keys_give_no_gradient_of_nan():
    tensors = {name: x.detach().double().requires_grad_() for name, x in inputs().items()}
    marks = landmarks(dtype=torch.float64, grad=True)
    key_mask = torch.ones(2, 37, dtype=torch.bool)
    key_mask[0, :9] = key_mask[1, 8:20] = False  # whole blocks, the first of all among them
    scores = block_scores(tensors["query"], tensors["key"], marks, key_mask=key_mask)
    scores[scores > float("-inf")].sum().backward()
    out, routing = attention(
        **tensors, landmarks=marks, top_k=9, key_mask=key_mask, return_routing=True
    )
    chosen = routing.log_probs[routing.indices >= 0]
    (out.sum() + chosen.sum()).backward()
    for name, x in (tensors | {"landmarks": marks}).items():
        assert x.grad.isfinite().all(), name


def test_packed_sequences_are_as_if_alone():
    lengths = [7, 1, 0, 22, 10]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = inputs(batch=1, q_len=40, kv_len=40)
    out, routing = attention(**tensors, top_k=2, cu_seqlens=bounds, return_routing=True)
    parts = zip(*(x.split(lengths, 2) for x in tensors.values()), strict=True)
    alone = [attention(*part, top_k=2, return_routing=True) for part in parts if part[0].numel()]
    helpers.assert_close(out, torch.cat([x for x, _ in alone], 2), 1e-5)
    for start, (_, found) in zip([0, 7, 8, 30], alone, strict=True):
        here = routing.indices[:, :, start : start + found.indices.shape[2]]
        width = found.indices.shape[3]
        assert torch.equal(here[..., :width], found.indices)
        assert (here[..., width:] == -1).all()


def test_memory_behind_the_keys_is_never_read():
    tensors = inputs(q_len=5)
    lengths = torch.tensor([20, 33])
    beyond = torch.arange(37) >= lengths[:, None]
    poisoned = dict(tensors)
    for name in ("key", "value"):
        x = tensors[name].detach()
        poisoned[name] = x.masked_fill(beyond[:, None, :, None], float("nan"))
    options = {"query_offset": lengths - 5, "kv_lengths": lengths, "top_k": 2}
    for marks in (None, landmarks()):
        found = attention(**poisoned, landmarks=marks, **options)
        helpers.assert_identical(found, attention(**tensors, landmarks=marks, **options))


def test_ties_go_to_the_lower_block():
    tensors = inputs()
    scores = torch.zeros(2, 2, 37, 10)
    scores[..., 3] = -0.0
    indices = attention(**tensors, scores=scores, top_k=3, return_routing=True)[1].indices
    assert indices[0, 0, 36].tolist() == [0, 1, 2]
    scores[..., 5] = 1.0
    indices = attention(**tensors, scores=scores, top_k=3, return_routing=True)[1].indices
    assert indices[0, 0, 36].tolist() == [5, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_no_block_is_chosen_by_a_score_of_nan_or_minus_infinity(dtype):
    scores = torch.zeros(2, 2, 37, 10, dtype=dtype)
    scores[..., 1], scores[..., 2], scores[..., 4] = float("nan"), float("-inf"), float("inf")
    scores[..., 8:] = float("nan")  # near or unfinished, not read
    indices = attention(**inputs(), scores=scores, top_k=7, return_routing=True)[1].indices
    assert indices[0, 0, 36].tolist() == [4, 0, 3, 5, 6, 7, -1]


def test_near_blocks_and_unfinished_ones_are_never_chosen():
    routing = attention(**inputs(), landmarks=landmarks(), near=2, return_routing=True)[1]
    own = torch.arange(37)[:, None] // SIZE
    assert (routing.indices < (own - 2).clamp(min=0)).all()
    assert ((routing.indices >= 0).sum(-1) == (own[:, 0] - 2).clamp(0)).all()


def test_scores_of_the_user_choose_as_the_routers_own_do():
    tensors = inputs()
    scores = block_scores(tensors["query"], tensors["key"], landmarks())
    helpers.assert_identical(
        attention(**tensors, scores=scores, top_k=2),
        attention(**tensors, landmarks=landmarks(), top_k=2),
    )


def test_chosen_indices_may_be_int64_and_without_any():
    tensors = inputs()
    for dtype in (torch.int32, torch.int64):
        none = torch.empty(2, 2, 37, 0, dtype=dtype)
        minus = torch.full((2, 2, 37, 3), -1, dtype=dtype)
        window = attention(**tensors, top_k=0)
        for indices in (none, minus):
            found = chosen_attention(**tensors, indices=indices, near=1)
            helpers.assert_close(found, window, 1e-6)


def test_half_precision_is_as_close_as_its_own_rounding():
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        tensors = inputs(dtype=dtype)
        routing = attention(**tensors, top_k=2, return_routing=True)[1]
        wide = {name: x.detach().double() for name, x in tensors.items()}
        expected = reference.block_topk_attention(
            **wide, indices=routing.indices, block_size=SIZE, near=1
        )
        out = chosen_attention(**tensors, indices=routing.indices, near=1)
        assert out.dtype == dtype
        helpers.assert_close(out, expected, tolerance)
