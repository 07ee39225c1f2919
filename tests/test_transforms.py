"""The operators under the transforms of PyTorch, on the backend that a user gets."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import flashmark
from flashmark import masks
from flashmark.nystrom.landmark_core import init_landmarks
from tests import helpers

MARKS = init_landmarks(2, 4, 8, generator=torch.Generator().manual_seed(0))
ATTEND = {
    "block-sparse": lambda q, k, v, **o: flashmark.block_sparse_attention(
        q, k, v, masks.causal(), **o
    ),
    "nystrom": lambda q, k, v, **o: flashmark.nystrom_attention(q, k, v, MARKS, **o),
    "hybrid": lambda q, k, v, **o: flashmark.hybrid_attention(q, k, v, MARKS, window=8, **o),
}


@pytest.fixture(params=ATTEND)
def name(request):
    return request.param


@pytest.fixture
def attend(name):
    return ATTEND[name]


def inputs(grad: bool = True):
    return helpers.qkv(1, 4, 40, 8, kv_heads=2, grad=grad)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jvp", "hessian"])
def test_torch_func(attend, transform):
    """In float32, on the backend that a user gets: derivatives of second order are PyTorch's."""
    query, key, value = inputs(grad=False)

    def of(**options):
        def total(q):
            return attend(q, key, value, **options).square().sum()

        return {
            "vmap": lambda: torch.vmap(total)(torch.stack([query, -query])),
            "grad": lambda: torch.func.grad(total)(query),
            "jacrev": lambda: torch.func.jacrev(total)(query),
            "jvp": lambda: torch.func.jvp(total, (query,), (query.cos(),))[1],
            "hessian": lambda: torch.func.hessian(lambda x: total(x * query))(torch.ones(4, 1, 1)),
        }[transform]()

    helpers.assert_close(of(), of(backend="reference"), 1e-4)


def test_forward_mode(attend):
    query, key, value = inputs(grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query.cos())
        found = torch.autograd.forward_ad.unpack_dual(attend(dual, key, value)).tangent
    _, wanted = torch.func.jvp(
        lambda q: attend(q, key, value, backend="reference"), (query,), (query.cos(),)
    )
    helpers.assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("loss", ["sum", "squares"])
def test_a_gradient_penalty(attend, loss):
    """Also where the incoming gradient is a constant."""

    def penalty(**options):
        leaves = inputs()
        out = attend(*leaves, **options)
        out = out.sum() if loss == "sum" else out.square().sum()
        grads = torch.autograd.grad(out, leaves, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        return [leaf.grad for leaf in leaves]

    for found, wanted in zip(penalty(), penalty(backend="reference"), strict=True):
        helpers.assert_close(found, wanted, 1e-4)


def test_create_graph_alone_gives_the_same_gradients(attend, name):
    leaves = inputs()
    plain = torch.autograd.grad(attend(*leaves).sum(), leaves)
    kept = torch.autograd.grad(attend(*leaves).sum(), leaves, create_graph=True)
    rounding = 1e-6 if name == "hybrid" else 0.0  # its far field is composed of PyTorch then
    for a, b in zip(plain, kept, strict=True):
        helpers.assert_close(b, a, rounding)


class NoHostReads(TorchDispatchMode):
    """A tensor's value may not reach Python: on a GPU that is a synchronisation, around which no
    CUDA graph can be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reading = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
        if any(name in func.name() for name in reading):
            raise AssertionError(f"{func} reads a value")
        if func.name() == "aten::index.Tensor" and any(
            x.dtype == torch.bool for x in args[1] if x is not None
        ):
            raise AssertionError("indexed by a bool tensor")
        return func(*args, **(kwargs or {}))


class ShapesOnly(TorchDispatchMode):
    """Mode in which our operators return shapes only: their inside belongs to the backends."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "flashmark":
            return func(*args, **(kwargs or {}))
        of_tensors = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor)
        out = func(*of_tensors(lambda x: x.to("meta"), args), **(kwargs or {}))
        return of_tensors(lambda x: torch.zeros(x.shape, dtype=x.dtype), out)


def steps():
    """Forward and backward of every operator with the inputs of a training or a decoding step."""
    window = flashmark.compile_mask(
        masks.causal() & masks.sliding_window(9), 1, 4, 40, 40, device="cpu"
    )
    offset = torch.tensor([7], dtype=torch.int32)
    bias, sinks = helpers.randn(4, 79, grad=True), helpers.randn(4, grad=True)
    sparse = flashmark.block_sparse_attention
    return {
        "causal": lambda q, k, v: sparse(q, k, v, masks.causal()),
        "block-mask": lambda q, k, v: sparse(q, k, v, window),
        "bias-sinks-dropout": lambda q, k, v: sparse(
            q, k, v, masks.causal(), bias=bias, sinks=sinks, softcap=5.0, dropout_p=0.5
        ),
        "decode": lambda q, k, v: sparse(
            q[:, :, :1], k, v, masks.causal(), query_offset=offset, kv_lengths=offset + 1
        ),
        "decode-block-mask": lambda q, k, v: sparse(q[:, :, :1], k, v, window, query_offset=offset),
        "nystrom": ATTEND["nystrom"],
        "nystrom-decay-mass": lambda q, k, v: flashmark.nystrom_attention(
            q, k, v, MARKS, normalize="mass", decay=torch.full((2, 4), 0.1),
            key_mask=torch.ones(1, 40, dtype=torch.bool),
        ),
        "hybrid": ATTEND["hybrid"],
        "sdpa": lambda q, k, v: flashmark.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }  # fmt: skip


@pytest.mark.parametrize("step", steps())
def test_no_step_reads_a_value_back(step, monkeypatch):
    """The path outside the kernels is the same on every device, but for checks of values that only
    CPU tensors get: those are switched off."""
    for module in ("attention", "checks"):
        monkeypatch.setattr(f"flashmark.nystrom.{module}.readable", lambda x: False)
    monkeypatch.setattr("flashmark.arguments.readable", lambda x: False)
    for name in ("tolist", "numpy"):  # which a mode does not see
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("reads values"))
    call, leaves = steps()[step], inputs()
    call(*leaves)  # what is compiled once is compiled here
    with ShapesOnly(), NoHostReads():
        call(*leaves).sum().backward()


def test_the_tripwire_trips():
    x = torch.ones(3)
    for read in (
        lambda: float(x.sum()),
        lambda: x[x > 0],
        lambda: bool(x.all()),
    ):
        with pytest.raises(AssertionError), NoHostReads():
            read()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(attend, dtype):
    leaves = inputs()
    with torch.autocast("cpu", dtype=dtype):
        out = attend(*leaves)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().sum(), leaves)
    halves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    wanted = attend(*halves)
    assert torch.equal(out, wanted)
    for actual, expected in zip(
        grads, torch.autograd.grad(wanted.float().sum(), halves), strict=True
    ):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected.float())


@pytest.mark.parametrize("how", ["saved-hooks", "reentrant", "selective"])
def test_activation_checkpointing(attend, how):
    leaves = inputs()
    wanted = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    options = {"use_reentrant": how == "reentrant"}
    calls = []
    if how == "selective":  # keep what our operators computed, recompute the rest

        def policy(ctx, func, *args, **kwargs):
            ours = func.namespace == "flashmark"
            calls.extend([func] * ours)
            return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
    out = checkpoint(lambda q, k, v: attend(q * 1.0, k, v), *leaves, **options)
    out.square().sum().backward()
    # a reentrant checkpoint runs first without gradients: there a hybrid call is one of C++
    rounding = 1e-6 if attend is ATTEND["hybrid"] and how == "reentrant" else 0.0
    for leaf, grad in zip(leaves, wanted, strict=True):
        helpers.assert_close(leaf.grad, grad, rounding)
    assert how != "selective" or calls


def test_deepcopied_and_pickled_masks_and_states_work():
    import copy
    import pickle

    query, key, value = inputs(grad=False)
    mask = flashmark.compile_mask(
        masks.causal() & masks.sliding_window(9), 1, 4, 40, 40, device="cpu"
    )
    wanted = flashmark.block_sparse_attention(query, key, value, mask)
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(flashmark.block_sparse_attention(query, key, value, again), wanted)


COMPOSED = {
    "slots": lambda q, k, v, x: flashmark.hybrid_attention(q, k, v, x, window=3),
    "mass": lambda q, k, v, x: flashmark.hybrid_attention(q, k, v, x, window=3, merge="mass"),
    "segment": lambda q, k, v, x: flashmark.variants.segment_attention(q, k, v, segment=3),
    "window": lambda q, k, v, x: flashmark.block_sparse_attention(
        q, k, v, masks.causal() & masks.sliding_window(3)
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_mask_made_under_a_transform_serves_later_calls(name):
    """Masks remembered for their sizes hold no tensor of a transform that has ended."""
    attend, length = COMPOSED[name], 7 + list(COMPOSED).index(name)  # sizes of its own
    landmarks = helpers.randn(1, 3, 8, dtype=torch.float64)
    query, key, value = helpers.qkv(1, 1, length, 8, dtype=torch.float64, grad=False)

    def loss(x):
        return attend(torch.cat([x, query[..., 1:]], -1), key, value, landmarks).square().sum()

    first, again = (torch.func.hessian(loss)(query[..., :1]) for _ in range(2))
    helpers.assert_identical(again, first)
    helpers.assert_close(loss(query[..., :1].clone().requires_grad_()), loss(query[..., :1]), 1e-12)


def test_a_training_step_of_a_mean_flow(monkeypatch):
    """The example's loss and gradients are those of the reference."""
    from examples import meanflow

    def step():
        torch.manual_seed(0)
        network = meanflow.Network()
        loss = meanflow.loss_of(network, meanflow.waves(4))
        return loss, *torch.autograd.grad(loss, list(network.parameters()))

    found = step()
    sparse = flashmark.block_sparse_attention
    monkeypatch.setattr(
        flashmark, "block_sparse_attention", functools.partial(sparse, backend="reference")
    )
    for x, y in zip(found, step(), strict=True):
        helpers.assert_close(x, y, 1e-4)
