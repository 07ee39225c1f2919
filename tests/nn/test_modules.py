"""The modules: what they compute, and that they behave as any module of PyTorch."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import flashmark
from flashmark import masks
from flashmark.causality import check_causality
from flashmark.nn import (
    BlockSparseAttention,
    CrossAttention,
    HybridAttention,
    NystromAttention,
    RoutedAttention,
    apply_rotary,
    rotary_angles,
)
from tests import helpers

N, WIDTH = 37, 32

MODULES = {
    "exact": lambda: BlockSparseAttention(WIDTH, 4, num_kv_heads=2, rotary=10_000.0),
    "window": lambda: BlockSparseAttention(
        WIDTH, 4, mask=masks.causal() & masks.sliding_window(9), sinks=True
    ),
    "nystrom": lambda: NystromAttention(WIDTH, 4, 6, num_kv_heads=2, decay=True),
    "nystrom-mass": lambda: NystromAttention(WIDTH, 4, 2, normalize="mass"),
    "slots": lambda: HybridAttention(WIDTH, 4, 4, window=5, num_kv_heads=2, rotary=10_000.0),
    "mass": lambda: HybridAttention(WIDTH, 4, 4, window=5, merge="mass"),
    "gate": lambda: HybridAttention(WIDTH, 4, 4, window=5, merge="gate", rotary=10_000.0),
    "gate-head": lambda: HybridAttention(WIDTH, 4, 4, window=5, merge="gate", gate="head"),
    "routed": lambda: RoutedAttention(
        WIDTH, 4, 3, num_kv_heads=2, block_size=4, top_k=2, rotary=10_000.0
    ),
    "routed-mean": lambda: RoutedAttention(
        WIDTH, 4, num_kv_heads=2, block_size=5, top_k=1, near=0, sinks=True
    ),
}


@pytest.fixture(params=MODULES)
def module(request):
    return MODULES[request.param]()


def loss_and_grads(module, x, **options):
    loss = module(x, **options).float().square().sum()
    return loss, torch.autograd.grad(loss, list(module.parameters()))


def heads(x, module, part):
    """Query, key or value heads by the rows of the fused projection, (B, H, N, D)."""
    groups = [module.num_heads, module.num_kv_heads, module.num_kv_heads]
    weight = module.qkv.weight.split([n * module.head_dim for n in groups])[part]
    return (x @ weight.mT).unflatten(-1, (groups[part], module.head_dim)).transpose(1, 2)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_made_where_float64_is_the_default(double_by_default, module):
    """Every parameter is float64, as PyTorch's modules have it, and what a cache keeps."""
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    x = torch.randn(2, N, WIDTH)
    with torch.no_grad():
        helpers.assert_close(module(x, cache=module.init_cache(2, N)), module(x), 1e-12)


@pytest.mark.parametrize("kind", [BlockSparseAttention, NystromAttention, HybridAttention])
def test_shapes_on_the_meta_device(kind):
    options = {BlockSparseAttention: (), NystromAttention: (3,), HybridAttention: (3,)}[kind]
    chunks = {"window": 4} if kind is HybridAttention else {}
    module = kind(32, 4, *options, **chunks).to("meta")
    x = torch.ones(2, 19, 32, device="meta")
    out = module(x)
    out.sum().backward()
    assert out.shape == x.shape and all(p.grad is not None for p in module.parameters())


def test_exact_is_causal_attention_of_the_projections():
    module, x = BlockSparseAttention(WIDTH, 4, num_kv_heads=2), helpers.randn(2, N, WIDTH)
    query, key, value = (heads(x, module, part) for part in range(3))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    helpers.assert_close(module(x), module.out(out.transpose(1, 2).flatten(2)), 1e-5)


def test_not_causal_sees_everything():
    module, x = BlockSparseAttention(WIDTH, 4, is_causal=False), helpers.randn(2, N, WIDTH)
    out = F.scaled_dot_product_attention(*(heads(x, module, part) for part in range(3)))
    helpers.assert_close(module(x), module.out(out.transpose(1, 2).flatten(2)), 1e-5)


def test_nystrom_is_the_operator_on_the_projections():
    module, x = MODULES["nystrom"](), helpers.randn(2, N, WIDTH)
    query, key, value = (heads(x, module, part) for part in range(3))
    decay = F.softplus(module.landmark_decay)
    assert (decay >= 0).all()
    memories = 1 / decay[0]
    helpers.assert_close(memories.max() / memories.min(), torch.tensor(9.0).exp(), 1e-4)
    out = flashmark.nystrom_attention(query, key, value, module.landmarks, decay=decay)
    helpers.assert_close(module(x), module.out(out.transpose(1, 2).flatten(2)), 1e-5)


@pytest.mark.parametrize("merge", ["slots", "mass", "gate"])
def test_hybrid_is_the_operator_on_the_projections(merge):
    module, x = HybridAttention(WIDTH, 4, 4, window=5, merge=merge), helpers.randn(2, N, WIDTH)
    query, key, value = (heads(x, module, part) for part in range(3))
    gate = module.gate(x).sigmoid().mT[..., None] if merge == "gate" else None
    out = flashmark.hybrid_attention(
        query, key, value, module.landmarks, window=5, merge=merge, gate=gate
    )
    helpers.assert_close(module(x), module.out(out.transpose(1, 2).flatten(2)), 1e-5)


@pytest.mark.parametrize("merge", ["slots", "mass", "gate"])
def test_hybrid_with_rotary_is_exact_where_the_window_covers_everything(merge):
    hybrid = HybridAttention(WIDTH, 4, 4, window=N, merge=merge, rotary=100.0, rotary_dim=4)
    exact = BlockSparseAttention(WIDTH, 4, rotary=100.0, rotary_dim=4)
    exact.load_state_dict(
        {name: x for name, x in hybrid.state_dict().items() if name.split(".")[0] in ("qkv", "out")}
    )
    x = helpers.randn(2, N, WIDTH)
    helpers.assert_close(hybrid(x), exact(x), 1e-5)


def test_the_future_changes_no_bit_of_the_past(module):
    report = check_causality(module, x=helpers.randn(2, N, WIDTH), positions=(0, 4, 5, 17, N - 2))
    assert report.ok, str(report)


def test_every_parameter_learns(module):
    grads = loss_and_grads(module, helpers.randn(2, N, WIDTH))[1]
    for (name, _), grad in zip(module.named_parameters(), grads, strict=True):
        # a choice of blocks has no gradient: tests/nn/test_routed.py trains landmarks
        constant = isinstance(module, RoutedAttention) and name == "landmarks"
        assert grad.isfinite().all() and grad.any() != constant


def test_state_dict_round_trip(module):
    x, buffer = helpers.randn(2, N, WIDTH), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    helpers.assert_identical(other(x), module(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(module, copied):
    x = helpers.randn(2, N, WIDTH)
    expected = module(x)
    helpers.assert_identical(copied(module)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(module, dtype):
    x = helpers.randn(2, N, WIDTH)
    expected = module.double()(x.double())
    out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    helpers.assert_close(out, expected, tolerance)


def test_autocast(module):
    x = helpers.randn(2, N, WIDTH)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    helpers.assert_close(out, expected, 5e-2)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_activation_checkpointing(module):
    x = helpers.randn(2, N, WIDTH)
    loss, grads = loss_and_grads(module, x)
    again = checkpoint(module, x, use_reentrant=False).square().sum()
    helpers.assert_identical(again, loss)
    for found, expected in zip(
        torch.autograd.grad(again, list(module.parameters())), grads, strict=True
    ):
        helpers.assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["exact", "nystrom", "slots", "routed"])
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    module, x = MODULES[name](), helpers.randn(2, N, WIDTH)
    key_mask = torch.ones(2, N, dtype=torch.bool)
    key_mask[0, :5] = False
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    # a hybrid reads from key_mask how many tokens there are: that is no one graph
    for options in ({}, {"key_mask": key_mask})[: 1 if name == "slots" else 2]:
        loss, grads = loss_and_grads(module, x, **options)
        found, found_grads = loss_and_grads(compiled, x, **options)
        helpers.assert_close(found, loss, 1e-5)
        for a, b in zip(found_grads, grads, strict=True):
            helpers.assert_close(a, b, 5e-5)


@pytest.mark.parametrize("name", ["exact", "nystrom", "routed", "routed-mean"])
def test_decoding_compiles_once(name):
    torch._dynamo.reset()
    module = MODULES[name]().requires_grad_(False)
    x, cache = helpers.randn(2, 6, WIDTH), module.init_cache(2, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(module, fullgraph=True, backend=counter)
    first, *tokens = x.split(1, 1)
    out = [module(first, cache=cache)]  # which begins the cache
    out = torch.cat(out + [step(token, cache=cache) for token in tokens], 1)
    helpers.assert_close(out, module(x), 1e-5)
    assert counter.frame_count == 1


def test_no_weight_decay_on_landmarks():
    for name in ("nystrom", "slots", "routed"):
        module = copy.deepcopy(MODULES[name]())
        decayed, spared = flashmark.landmark_parameter_groups(module, 0.1)
        names = {id(p): name for name, p in module.named_parameters()}
        assert {names[id(p)] for p in decayed["params"]} == {"qkv.weight", "out.weight"}
        assert all(names[id(p)].startswith("landmark") for p in spared["params"])
        assert spared["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["nystrom", "nystrom-mass", "mass", "gate"])
def test_a_call_uses_the_landmarks_as_they_are(name):
    """Through a write that no version counter shows, at the same address."""
    module, x = MODULES[name]().eval(), helpers.randn(1, N, WIDTH)
    with torch.no_grad():
        module(x)
        module.landmarks.data.mul_(0.5)
        version = module.landmarks._version
        found = module(x)
        module.landmarks = torch.nn.Parameter(module.landmarks.clone())
        helpers.assert_identical(found, module(x))
    assert version == 0


@pytest.mark.parametrize("name", ["nystrom", "nystrom-mass", "mass", "gate"])
def test_a_cache_keeps_the_core_that_it_began_with(name, monkeypatch):
    module, x = MODULES[name]().eval(), helpers.randn(2, 6, WIDTH)
    source = sys.modules[type(module).__module__]
    calls, compute = [], source.landmark_core
    monkeypatch.setattr(
        source, "landmark_core", lambda *a, **k: calls.append(1) or compute(*a, **k)
    )
    with torch.no_grad():
        cache = module.init_cache(2)
        for token in x.split(1, 1):
            module(token, cache=cache)
    assert len(calls) == 1


def test_dropout_only_while_training():
    module, x = BlockSparseAttention(WIDTH, 4, dropout_p=0.5), helpers.randn(2, N, WIDTH)
    assert not torch.equal(module(x), module(x))
    module.eval()
    helpers.assert_identical(module(x), module(x))


def test_rotary_products_depend_on_the_distance():
    query, key = helpers.randn(1, 1, 1, 16), helpers.randn(1, 1, 1, 16, seed=1)

    def product(p, j):
        angles = (rotary_angles(torch.tensor([[n]]), 12) for n in (p, j))
        turned = (apply_rotary(x, a) for x, a in zip((query, key), angles, strict=True))
        return torch.mul(*turned).sum()

    helpers.assert_close(product(3, 1), product(1003, 1001), 1e-3)
    assert (product(3, 1) - product(3, 2)).abs() > 1e-2
    helpers.assert_identical(apply_rotary(query, rotary_angles(torch.tensor([[0]]), 12)), query)


@pytest.mark.parametrize("size", [(0, 5), (2, 0), (2, 1)], ids=str)
def test_few_tokens(module, size):
    x = helpers.randn(*size, WIDTH)
    out = module(x, key_mask=torch.zeros(size, dtype=torch.bool))
    assert out.shape == x.shape and not out.any()
    assert module(x).isfinite().all()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BlockSparseAttention(32, 5), ValueError, "num_heads: expected a divisor of"),
        (lambda: BlockSparseAttention(32, 4, num_kv_heads=3), ValueError, "a divisor of 4, got 3"),
        (lambda: BlockSparseAttention(32, 0), ValueError, "num_heads: expected an int >= 1, got 0"),
        (lambda: BlockSparseAttention(32, 4, rotary=True), ValueError, "rotary: .* got True"),
        (lambda: BlockSparseAttention(32, 4, rotary=1e4, rotary_dim=3), ValueError, "an even int"),
        (lambda: BlockSparseAttention(32, 4, dropout_p=1.0), ValueError, "dropout_p: expected"),
        (lambda: BlockSparseAttention(32, 4, mask=torch.ones(3)), TypeError, "mask: expected"),
        (lambda: BlockSparseAttention(32, 4, dropout_p=float("nan")), ValueError, "dropout_p: "),
        (lambda: BlockSparseAttention(32, 4, dropout_p="0.1"), TypeError, "dropout_p: expected a"),
        (lambda: BlockSparseAttention(32, 4, softcap=-1.0), ValueError, "softcap: expected a"),
        (lambda: BlockSparseAttention(32, 4, softcap="20"), TypeError, "softcap: expected a"),
        (lambda: BlockSparseAttention(32, 4, head_dim=257), ValueError, "head_dim: .* 1 to 256"),
        (lambda: BlockSparseAttention(2056, 8), ValueError, "head_dim: expected 1 to 256, got 257"),
        (lambda: BlockSparseAttention(32, 4, rotary=1e4, rotary_dim=4.0), TypeError, "rotary_dim"),
        (lambda: CrossAttention(32, 5), ValueError, "num_heads: expected a divisor of"),
        (lambda: CrossAttention(32, 4, 0), ValueError, "memory_dim: expected an int >= 1, got 0"),
        (lambda: CrossAttention(32, 4, head_dim=0), ValueError, "head_dim: expected an int >= 1"),
        (lambda: CrossAttention(32, 4, head_dim=300), ValueError, "head_dim: expected 1 to 256"),
        (lambda: CrossAttention(32, 4.0), TypeError, "num_heads: expected an int >= 1, got float"),
        (lambda: CrossAttention(32, 4, dropout_p=1.0), ValueError, "dropout_p: expected"),
        (lambda: RoutedAttention(32, 4, softcap=float("inf")), ValueError, "softcap: expected"),
        (lambda: RoutedAttention(32, 4, block_size=1025), ValueError, "block_size: .* 1 to 1024"),
        (lambda: RoutedAttention(32, 4, 257), ValueError, "landmarks: expected 1 to 256"),
        (lambda: NystromAttention(32, 4, 257), ValueError, "landmarks: expected 1 to 256, got 257"),
        (lambda: NystromAttention(32, 4, 4.0), TypeError, "landmarks: expected an int >= 1"),
        (lambda: HybridAttention(32, 4, 257, window=4), ValueError, "landmarks: expected 1 to 256"),
        (lambda: NystromAttention(32, 4, 0), ValueError, "landmarks: expected an int >= 1"),
        (lambda: NystromAttention(32, 4, 4, normalize="x"), ValueError, "normalize: expected"),
        (lambda: HybridAttention(32, 4, 4, window=0), ValueError, "window: expected an int >= 1"),
        (lambda: HybridAttention(32, 4, 4, window=4, merge="x"), ValueError, "merge: expected"),
        (lambda: HybridAttention(32, 4, 4, window=4, gate="x"), ValueError, "gate: expected"),
        (
            lambda: HybridAttention(32, 4, 4, window=4, rotary=1e4, rotary_dim=10),
            ValueError,
            "rotary_dim: expected an even int from 2 to 8, got 10",
        ),
        (
            lambda: HybridAttention(32, 4, 4, window=4, rotary=1e4, rotary_dim=8, merge="mass"),
            NotImplementedError,
            "rotary_dim: expected less than head_dim 8 with merge='mass'",
        ),
    ],
)  # fmt: skip
def test_bad_options(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_bad_inputs(module):
    x = helpers.randn(2, 3, WIDTH)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, N, 32\), got \(2, 3, 31\)"):
        module(x[..., :31])
    with pytest.raises(TypeError, match="key_mask: expected a bool tensor"):
        module(x, key_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"key_mask: expected shape \(2, 3\)"):
        module(x, key_mask=torch.ones(2, 4, dtype=torch.bool))


def test_reached_from_the_package_on_demand():
    code = "import sys, flashmark; assert 'flashmark.nn' not in sys.modules; flashmark.nn.rotary"
    subprocess.run([sys.executable, "-c", code], check=True)
