"""flashmark.scaled_dot_product_attention is PyTorch's, wherever a call goes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as theirs

import flashmark
from flashmark.integrations import sdpa
from tests import helpers

ours = flashmark.scaled_dot_product_attention

LENGTHS = [(130, 130), (60, 300), (300, 60), (1, 20000)]


@pytest.fixture
def routed(monkeypatch):
    """Record of the paths that calls took."""
    went = []
    attend, leave = sdpa.block_sparse_attention, sdpa._torch_attention
    for name, function in (("block_sparse_attention", attend), ("_torch_attention", leave)):

        def note(*args, _name=name, _function=function, **kwargs):
            went.append("ours" if _name == "block_sparse_attention" else "torch")
            return _function(*args, **kwargs)

        monkeypatch.setattr(sdpa, name, note)
    return went


@pytest.fixture
def any_backend(monkeypatch):
    """Our kernels run whether or not they would be ahead here."""
    monkeypatch.setattr(sdpa, "_ahead", lambda *_: True)


def check(query, key, value, mask=None, tolerance=1e-5, **options):
    """Outputs and gradients, the float mask's included, against PyTorch in float64."""
    leaves = [x for x in (query, key, value, mask) if x is not None and x.requires_grad]
    out = ours(query, key, value, mask, **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wide_mask = wide[3] if len(wide) == 4 else mask
    if wide_mask is not None and wide_mask.is_floating_point():
        wide_mask = wide_mask.double()
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones lose gradients beside finfo.min
        exact = theirs(*wide[:3], wide_mask, **options)
    assert out.shape == exact.shape and out.dtype == query.dtype
    helpers.assert_close(out, exact, tolerance)
    d_out = helpers.randn(*out.shape, seed=9)
    grads = torch.autograd.grad(out, leaves, d_out)
    wanted = torch.autograd.grad(exact, wide, d_out.double())
    largest = max(float(x.abs().max()) for x in wanted if x.numel()) if leaves else 0.0
    for actual, expected in zip(grads, wanted, strict=True):
        if expected.numel() and float(expected.abs().max()) < 1e-9 * largest:
            # 0 but for rounding, as of scores where a row sees one key: as small beside the others
            assert float(actual.abs().max()) <= 5 * tolerance * largest
        else:
            helpers.assert_close(actual, expected, 5 * tolerance)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["dense", "causal"])
def test_causality_is_aligned_to_the_top_left(any_backend, routed, lengths, is_causal):
    q_len, kv_len = lengths
    check(*helpers.qkv(1, 2, q_len, 16, kv_len=kv_len), is_causal=is_causal)
    assert set(routed) == {"ours"}


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_two_to_four_dimensions(any_backend, routed, dims):
    shape = (2, 3)[: dims - 2]
    query, key, value = (helpers.randn(*shape, n, 8, seed=n, grad=True) for n in (40, 50, 50))
    check(query, key, value)
    check(query, key, value, helpers.randn(40, 50) > 0)
    assert set(routed) == {"ours"}


@pytest.mark.parametrize("scale", [None, 0.3, 2])
def test_grouped_heads_scale_and_value_width(any_backend, routed, scale):
    query, key, value = helpers.qkv(2, 6, 40, 16, kv_heads=2, v_dim=24)
    check(query, key, value, enable_gqa=True, scale=scale)
    assert set(routed) == {"ours"}


SHAPES = [(40, 50), (1, 50), (4, 40, 50), (2, 1, 40, 50), (2, 4, 40, 50), (2, 1, 1, 50)]


@pytest.mark.parametrize("kind", ["bool", "float", "constant", "infinite"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_masks(any_backend, routed, shape, kind):
    mask = helpers.randn(*shape, seed=5)
    if kind == "bool":
        mask = mask > -0.5
    elif kind == "float":
        mask.requires_grad_()
    elif kind == "infinite":
        mask = mask.masked_fill(mask < -0.5, -torch.inf)
    check(*helpers.qkv(2, 4, 40, 16, kv_heads=4, kv_len=50), mask)
    assert set(routed) == {"ours"}


def test_rows_that_see_nothing_are_zero_as_in_torch(any_backend):
    query, key, value = helpers.qkv(1, 2, 20, 8)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[7] = False
    check(query, key, value, mask)
    assert not ours(query, key, value, mask)[:, :, 7].any()
    lowest = torch.zeros(20, 20).masked_fill(~mask, torch.finfo(torch.float32).min)
    check(query, key, value, lowest)  # a mean, as in torch: the lowest number is not -inf


def test_a_mask_that_changes_in_place_is_never_stale(any_backend):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    for width in (5, 11):
        check(query, key, value, mask)
        mask &= torch.ones(40, 40, dtype=torch.bool).triu(-width)
    check(query, key, value, mask)


@pytest.mark.parametrize("how", ["in-place", "data", "numpy"])
def test_a_mask_is_read_at_each_call(any_backend, how):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    ours(query, key, value, mask)
    written = {"in-place": mask, "data": mask.data, "numpy": mask.numpy()}[how]
    written[:, 1:20] = False
    check(query, key, value, mask)
    gone = weakref.ref(mask)
    del mask, written
    gc.collect()
    assert gone() is None


def test_dropout_is_that_of_the_softmax(any_backend, routed):
    query, key, _ = helpers.qkv(1, 2, 64, 8, kv_len=64, grad=False)
    value = torch.eye(64).expand(1, 2, 64, 64)
    weights, dropped = ours(query, key, value), ours(query, key, value, dropout_p=0.25)
    kept = dropped != 0
    assert 0.7 < kept.float().mean() < 0.8
    helpers.assert_close(dropped[kept], weights[kept] / 0.75, 1e-5)
    assert routed == ["ours", "ours"]


def test_autocast_and_half_precision(any_backend, routed):
    query, key, value = helpers.qkv(1, 2, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = (f(query, key, value, is_causal=True) for f in (ours, theirs))
    assert out.dtype == wanted.dtype == torch.bfloat16
    helpers.assert_close(out, wanted.float(), 2e-2)
    assert routed == ["ours"]


ELSEWHERE = {
    "float64": lambda: helpers.qkv(1, 2, 200, 8, dtype=torch.float64),
    "five-dimensions": lambda: [helpers.randn(2, 1, 2, 130, 8, seed=n) for n in range(3)],
    "wide-heads": lambda: helpers.qkv(1, 1, 130, 300),
    "few-pairs": lambda: helpers.qkv(1, 2, 100, 8),
    "one-head-of-keys": lambda: helpers.qkv(1, 2, 200, 8, kv_heads=1),
    "no-keys": lambda: [helpers.randn(1, 1, n, 8) for n in (200, 0, 0)],
    "broadcast-batch": lambda: [helpers.randn(n, 1, 200, 8) for n in (2, 1, 1)],
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_we_do_not_take_goes_to_torch(routed, case):
    tensors = ELSEWHERE[case]()
    out = ours(*tensors)
    assert routed == ["torch"]
    assert torch.equal(out, theirs(*tensors))


@pytest.mark.filterwarnings("ignore")
def test_transforms_go_to_torch(routed, any_backend):
    query, key, value = (helpers.randn(3, 2, 20, 8, seed=n) for n in range(3))
    out = torch.vmap(lambda q: ours(q, key, value))(torch.stack([query, query + 1]))
    helpers.assert_close(out[1], theirs(query + 1, key, value).double(), 1e-5)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda q: ours(q, key, value), (query,), (query,))
    assert torch.isfinite(tangent).all()
    assert set(routed) == {"torch"}


def test_scale_may_be_a_bool_as_in_torch(any_backend):
    check(*helpers.qkv(1, 2, 130, 8), scale=True)


def test_what_torch_refuses_is_refused(any_backend):
    query, key, value = helpers.qkv(1, 2, 130, 8, grad=False)
    mask = torch.ones(130, 130, dtype=torch.bool)
    for arguments, options in (
        ((query, key, value, mask[:7, :7]), {}),
        ((query, key.double(), value), {}),
        ((query, key[..., :4], value), {}),
        ((query, key, value), {"dropout_p": 1.5}),
        ((query, key, value, mask.int()), {}),
        ((query, key, value), {"enable_gqa": None}),
    ):
        raised = []
        for function in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
                function(*arguments, **options)
            raised.append(error.type)
        assert raised[0] is raised[1]


@pytest.mark.plain_empty
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_compiled_to_one_graph(any_backend, mask):
    torch._dynamo.reset()
    query, key, value = helpers.qkv(1, 2, 40, 8, kv_len=50)
    given = {"bool": helpers.randn(40, 50) > 0, "float": helpers.randn(40, 50)}.get(mask)
    call = torch.compile(ours, fullgraph=True, backend="aot_eager")
    options = {"is_causal": mask == "causal"}
    wanted = theirs(query, key, value, given, **options)
    helpers.assert_close(call(query, key, value, given, **options), wanted.double(), 1e-5)


def test_this_machine_runs_large_calls_itself(routed):
    if "cpu" not in helpers.BACKENDS:
        pytest.skip("needs the C++ extension")
    ours(*helpers.qkv(1, 1, 128, 8), is_causal=True)
    assert routed == ["ours"]


def second_derivatives(attend, query, key, value):
    with sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(attend(query, key, value).sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [query, key, value])


def batched_gradients(attend, query, key, value):
    out = attend(query, key, value, is_causal=True)
    d_out = helpers.randn(3, *out.shape, seed=4)
    return torch.autograd.grad(out, [query, key, value], d_out, is_grads_batched=True)


def gradients_of_a_float_mask(attend, query, key, value):
    mask = helpers.randn(query.shape[2], key.shape[2], seed=6, grad=True)
    out = attend(query, key, value, mask)
    d_out = helpers.randn(2, *out.shape, seed=4)
    return torch.autograd.grad(out, [query, mask], d_out, is_grads_batched=True)


def vectorised_jacobian(attend, query, key, value):
    return torch.autograd.functional.jacobian(
        lambda x: attend(query, x, value)[..., :2, :3], key.detach(), vectorize=True
    )


def traced(attend, *tensors):
    tensors = [x.detach() for x in tensors]
    program = torch.jit.trace(lambda *x: attend(*x), tensors, check_trace=False)
    return program(*(x * 1.5 for x in tensors))


def nested(attend, *tensors):
    parts = [torch.nested.nested_tensor([x[0].detach(), 2 * x[0].detach()]) for x in tensors]
    return attend(*parts).to_padded_tensor(0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "call",
    [second_derivatives, batched_gradients, gradients_of_a_float_mask, vectorised_jacobian, traced,
     nested],
)  # fmt: skip
def test_programs_of_pytorchs_attention_run_unchanged(any_backend, call):
    leaves = helpers.qkv(1, 2, 130, 8)
    found, wanted = call(ours, *leaves), call(theirs, *leaves)
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    for got, want in zip(found, wanted, strict=True):
        helpers.assert_close(got, want, 1e-4)
