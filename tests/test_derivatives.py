"""Forward mode, second derivatives and vmap of the operators, in float64, against PyTorch's
transforms of the references."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import flashmark
from flashmark import masks, reference
from tests import helpers

DOUBLE = torch.float64
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 2, 2]])


def block_sparse(q_len=4, kv_len=6, mask=None, *, bias=None, sinks=False, batch=2, **options):
    """A call as a function of its differentiable tensors, and these."""
    tensors = {
        "query": helpers.randn(batch, 2, q_len, 2, dtype=DOUBLE, seed=1),
        "key": helpers.randn(batch, 1, kv_len, 2, dtype=DOUBLE, seed=2),
        "value": helpers.randn(batch, 1, kv_len, 1, dtype=DOUBLE, seed=3),
    }
    if bias is not None:
        tensors["bias"] = helpers.randn(*bias, dtype=DOUBLE, seed=4)
    if sinks:
        tensors["sinks"] = helpers.randn(2, dtype=DOUBLE, seed=5)
    return "block_sparse_attention", tensors, {"mask": mask, "return_lse": True, **options}


def nystrom(tokens=6, *, decay=False, core=False, **options):
    tensors = {
        "query": helpers.randn(1, 2, tokens, 2, dtype=DOUBLE, seed=1),
        "key": helpers.randn(1, 1, tokens, 2, dtype=DOUBLE, seed=2),
        "value": helpers.randn(1, 1, tokens, 1, dtype=DOUBLE, seed=3),
        "landmarks": helpers.randn(1, 3, 2, dtype=DOUBLE, seed=4),
    }
    if decay:
        tensors["decay"] = helpers.randn(1, 3, dtype=DOUBLE, seed=5).abs()
    if core:
        tensors["core"] = helpers.randn(1, 3, 3, dtype=DOUBLE, seed=6)
    return "nystrom_attention", tensors, {"return_state": True, **options}


def hybrid(merge, tokens=7, **options):
    name, tensors, _ = nystrom(tokens)
    if merge == "gate":
        tensors["gate"] = helpers.randn(1, 2, tokens, 1, dtype=DOUBLE, seed=5).sigmoid()
    return "hybrid_attention", tensors, {"window": 2, "merge": merge, **options}


def routed(**options):
    """Landmarks choose the blocks: they take part in the choice alone, which has no gradient."""
    _, tensors, _ = block_sparse(9, 9, batch=1, sinks=True)
    landmarks = helpers.randn(1, 2, 2, dtype=DOUBLE, seed=4)
    options = {"landmarks": landmarks, "block_size": 2, "top_k": 1, "near": 1} | options
    return "routed_attention", tensors, options


def chosen_blocks(**options):
    _, tensors, _ = block_sparse(7, 7, batch=1, sinks=True)
    block = torch.tensor([-1, -1, 0, 0, 1, 0, 1], dtype=torch.int32)
    options = {"indices": block.view(1, 1, 7, 1), "block_size": 2, "near": 0} | options
    return "block_topk_attention", tensors, {"return_lse": True, **options}


LENGTHS = torch.tensor([3, 6], dtype=torch.int32)
HIDDEN = torch.tensor([[False, True, True, False] + [True] * 5])
CASES = {
    "dense": lambda: block_sparse(),
    "causal": lambda: block_sparse(mask=masks.causal()),
    "window": lambda: block_sparse(mask=masks.causal() & masks.sliding_window(3)),
    "documents": lambda: block_sparse(mask=masks.causal() & masks.documents(DOCUMENTS)),
    "by-head": lambda: block_sparse(mask=masks.dense(torch.rand(2, 4, 6) > 0.4)),
    "function": lambda: block_sparse(mask=masks.mask_mod(lambda b, h, i, j: (i + j + b) % 3 > 0)),
    "empty-rows": lambda: block_sparse(5, 3, masks.causal(), bias=(2, 7)),
    "empty-rows-sinks": lambda: block_sparse(5, 3, masks.causal(), sinks=True),
    "one-token": lambda: block_sparse(1, 1, masks.causal(), sinks=True),
    "softcap": lambda: block_sparse(mask=masks.causal(), softcap=1.5),
    "relative-bias": lambda: block_sparse(mask=masks.causal(), bias=(2, 9), softcap=1.5),
    "dense-bias": lambda: block_sparse(bias=(2, 1, 4, 6), sinks=True),
    "dropout": lambda: block_sparse(dropout_p=0.4, dropout_seed=3),
    "decode": lambda: block_sparse(
        2, 6, masks.causal(), bias=(2, 11), query_offset=torch.tensor([2, 4], dtype=torch.int32),
        kv_lengths=LENGTHS,
    ),
    "nystrom": lambda: nystrom(),
    "nystrom-decay": lambda: nystrom(decay=True, key_mask=HIDDEN[:, :6]),
    "nystrom-mass": lambda: nystrom(decay=True, normalize="mass", key_mask=HIDDEN[:, :6]),
    "nystrom-packed": lambda: nystrom(
        core=True, cu_seqlens=torch.tensor([0, 5, 5, 6], dtype=torch.int32)
    ),
    "nystrom-bidirectional": lambda: nystrom(core=True, is_causal=False),
    "hybrid-slots": lambda: hybrid("slots"),
    "hybrid-slots-masked": lambda: hybrid("slots", 9, key_mask=HIDDEN),
    "hybrid-mass": lambda: hybrid("mass"),
    "hybrid-gate": lambda: hybrid("gate"),
    "routed": lambda: routed(),
    "routed-by-mean": lambda: routed(landmarks=None, softcap=1.5),
    "chosen-blocks": lambda: chosen_blocks(),
    "chosen-blocks-softcap": lambda: chosen_blocks(
        softcap=1.5, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32)
    ),
}  # fmt: skip
SOME = ["documents", "relative-bias", "nystrom-mass", "hybrid-slots", "routed", "chosen-blocks"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr("flashmark.nystrom.composed.CHUNK", 4)


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.fixture(params=SOME)
def some(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def functions(case):
    """The operator and its reference as functions of tensors, and the tensors."""
    name, tensors, options = case

    def call(module, *given):
        named = dict(zip(tensors, given, strict=True))
        return tuple(pytree.tree_leaves(getattr(module, name)(**named, **options)))

    return functools.partial(call, flashmark), functools.partial(call, reference), tensors.values()


def leaves(tensors):
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def loss(function):
    """A number without symmetries that would hide an error."""

    def total(*given):
        outs = function(*given)
        return sum(x.masked_fill(x.isinf(), 0.0).sin().sum() for x in outs)

    return total


def assert_alike(function, expected, *given):
    found, wanted = (pytree.tree_leaves(f(*given)) for f in (function, expected))
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def finite(function):
    """gradcheck knows no infinities: lse is -inf where a row sees nothing."""
    return lambda *given: tuple(x.masked_fill(x.isinf(), 0.0) for x in function(*given))


def test_first_derivatives_forward_and_reverse(case):
    """Along drawn directions; every entry is in the second derivatives."""
    attend, _, tensors = functions(case)
    assert gradcheck(finite(attend), leaves(tensors), check_forward_ad=True, fast_mode=True)


def test_second_derivatives(case):
    """A gradient penalty in which the loss itself takes part, and every tensor."""
    attend, expected, tensors = functions(case)

    def second(function, *given):
        given = leaves(given)
        total = loss(function)(*given)
        grads = torch.autograd.grad(total, given, create_graph=True)
        penalty = sum((grad * grad.detach().cos()).sum() for grad in grads) + total
        return torch.autograd.grad(penalty, given)

    assert_alike(functools.partial(second, attend), functools.partial(second, expected), *tensors)


@pytest.mark.parametrize("name", ["window", "decode"])
def test_every_entry_of_the_second_derivative(name):
    attend, _, tensors = functions(CASES[name]())
    assert gradgradcheck(finite(attend), leaves(tensors), check_fwd_over_rev=True)


@pytest.mark.parametrize("transform", ["jvp", "jacrev", "jacfwd", "hessian", "grad-of-grad"])
def test_torch_func(some, transform):
    attend, expected, tensors = functions(some)
    tensors = tuple(tensors)
    tangents = tuple(helpers.randn(*x.shape, dtype=DOUBLE, seed=9) for x in tensors)
    which = tuple(range(1, len(tensors)))

    def of(function):
        gradient = torch.func.grad(loss(function), argnums=which)

        def penalty(*given):
            return sum(x.square().sum() for x in gradient(*given))

        return {
            "jvp": lambda *given: torch.func.jvp(function, given, tangents),
            "jacrev": torch.func.jacrev(function, argnums=which),
            "jacfwd": torch.func.jacfwd(function, argnums=which),
            "hessian": torch.func.hessian(loss(function), argnums=which[:2]),
            "grad-of-grad": torch.func.grad(penalty, argnums=which),
        }[transform]

    assert_alike(of(attend), of(expected), *tensors)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("which", ["all", "query", "parameters"])
def test_vmap(name, which):
    """The mapped tensors are batches in dimension 1, or the last; the others are shared."""
    case = CASES[name]()
    attend, expected, tensors = functions(case)
    mapped = {"all": list(case[1]), "query": ["query"], "parameters": list(case[1])[3:]}[which]
    given, dims = [], []
    for n, (name, x) in enumerate(case[1].items()):
        dim = None if name not in mapped else (1 if n % 2 else -1)
        given.append(x if dim is None else torch.stack([x, -x, 0.5 * x], dim))
        dims.append(dim)
    dims, everything = tuple(dims), tuple(range(len(dims)))
    if all(dim is None for dim in dims):
        pytest.skip("no such tensors")

    def of(function):
        def per_sample(*given):
            return function(*given), torch.func.grad(loss(function), argnums=everything)(*given)

        return torch.vmap(per_sample, in_dims=dims)

    if any(name == "decay" and dim is not None for name, dim in zip(case[1], dims, strict=True)):
        given[list(case[1]).index("decay")].abs_()
    assert_alike(of(attend), of(expected), *given)


MODULES = {
    "block-sparse": lambda: flashmark.nn.BlockSparseAttention(16, 2),
    "nystrom": lambda: flashmark.nn.NystromAttention(16, 2, 4),
    "hybrid": lambda: flashmark.nn.HybridAttention(16, 2, 4, window=4),
    "routed": lambda: flashmark.nn.RoutedAttention(16, 2, block_size=4, top_k=1),
}
TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODULES)
def test_a_cache_is_refused_where_a_derivative_would_be_lost(name, transform):
    module = MODULES[name]().requires_grad_(False)
    cache = module.init_cache(1, 8)
    with pytest.raises(ValueError, match="^cache: expected a call "):
        TRANSFORMS[transform](lambda x: module(x, cache=cache), torch.randn(1, 1, 16))
    assert not cache.length.any()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["nystrom", "hybrid"])
def test_a_state_is_not_written_where_a_derivative_would_be_lost(name, transform):
    attend = {
        "nystrom": flashmark.nystrom_attention,
        "hybrid": functools.partial(flashmark.hybrid_attention, window=2),
    }[name]
    landmarks = helpers.randn(1, 3, 4)
    x = helpers.randn(1, 1, 2, 4)
    _, state = attend(x, x, x, landmarks, return_state=True)
    with pytest.raises(ValueError, match="^state_out: expected a call "):
        TRANSFORMS[transform](lambda x: attend(x, x, x, landmarks, state=state, state_out=state), x)
