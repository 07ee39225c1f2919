"""torch.compile and torch.export over many lengths: how many graphs, and the right numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import flashmark
from flashmark import masks
from flashmark.nn import HybridAttention
from flashmark.nystrom.landmark_core import init_landmarks
from tests import helpers

pytestmark = pytest.mark.plain_empty  # Dynamo would trace the filling

LENGTHS = (140, 257, 300, 364, 530)
MARKS = torch.nn.Parameter(init_landmarks(2, 4, 8, generator=torch.Generator().manual_seed(0)))
WINDOW = masks.causal() & masks.sliding_window(50)


def sparse(query, key, value, mask=None, **options):
    return flashmark.block_sparse_attention(query, key, value, mask, **options)


def compiled_window(n):
    return flashmark.compile_mask(WINDOW, 2, 4, n, n, device="cpu")


def compiled_padding(n):
    lengths = masks.key_padding(torch.tensor([n - 3, n]))
    return flashmark.compile_mask(masks.causal() & lengths, 2, 4, n, n, device="cpu")


def offsets(n):
    return torch.tensor([n - 9, n - 2], dtype=torch.int32)


#: the call, and what it takes besides query, key and value at length n
CALLS = {
    "dense": (sparse, lambda n: ()),
    "causal": (lambda q, k, v: sparse(q, k, v, masks.causal()), lambda n: ()),
    "scale-softcap": (
        lambda q, k, v: sparse(q, k, v, masks.causal(), scale=0.3, softcap=4.0),
        lambda n: (),
    ),
    "block-mask": (sparse, lambda n: (compiled_window(n),)),
    "mask-per-sample": (sparse, lambda n: (compiled_padding(n),)),
    "relative-bias": (
        lambda q, k, v, bias: sparse(q, k, v, masks.causal(), bias=bias),
        lambda n: (helpers.randn(4, 2 * n - 1),),
    ),
    "dense-bias": (
        lambda q, k, v, bias: sparse(q, k, v, bias=bias),
        lambda n: (helpers.randn(2, 1, n, n),),
    ),
    "cache": (
        lambda q, k, v, offset: sparse(
            q[:, :, :1], k, v, masks.causal(), query_offset=offset, kv_lengths=offset + 1
        ),
        lambda n: (offsets(n),),
    ),
    "nystrom": (lambda q, k, v: flashmark.nystrom_attention(q, k, v, MARKS), lambda n: ()),
    "nystrom-core-padding": (
        lambda q, k, v, core, keep: flashmark.nystrom_attention(
            q, k, v, MARKS, core=core, key_mask=keep
        ),
        lambda n: (torch.eye(4).expand(2, 2, 4, 4), torch.arange(n).expand(2, n) > 3),
    ),
    "sdpa": (
        lambda q, k, v: flashmark.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
        lambda n: (),
    ),
}


def inputs(n, grad):
    return helpers.qkv(2, 4, n, 8, kv_heads=2, grad=grad)


def graphs(call, more, lengths, *, grad, dynamic):
    """Graphs that calls at these lengths need, each call compared with the uncompiled one."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in lengths:
        leaves, extra = inputs(n, grad), more(n)
        out, wanted = compiled(*leaves, *extra), call(*leaves, *extra)
        helpers.assert_close(out, wanted, 1e-5)
        if grad:
            d_out = helpers.randn(*out.shape, seed=5)
            for a, b in zip(
                torch.autograd.grad(out, leaves, d_out),
                torch.autograd.grad(wanted, leaves, d_out),
                strict=True,
            ):
                helpers.assert_close(a, b, 1e-5)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["causal", "block-mask", "nystrom"])
def test_five_lengths_need_two_graphs(name):
    """The first length, and all others."""
    assert graphs(*CALLS[name], LENGTHS, grad=True, dynamic=None) == 2


@pytest.mark.parametrize("name", CALLS)
def test_dynamic_from_the_start(name):
    assert graphs(*CALLS[name], LENGTHS[:3], grad=name == "cache", dynamic=True) <= 2


def test_an_expression_is_compiled_for_every_length():
    """Correct, at one graph a length; a BlockMask as an input needs no more than two."""
    call = lambda q, k, v: sparse(q, k, v, WINDOW)  # noqa: E731
    assert graphs(call, lambda n: (), LENGTHS[:2], grad=False, dynamic=True) == 2


def test_hybrid_attention_at_several_lengths():
    call = lambda q, k, v: flashmark.hybrid_attention(q, k, v, MARKS, window=128)  # noqa: E731
    graphs(call, lambda n: (), LENGTHS[:2], grad=False, dynamic=True)


@pytest.mark.parametrize("name", ["block-mask", "cache", "nystrom"])
def test_export(name):
    call, more = CALLS[name]

    class Model(torch.nn.Module):
        def forward(self, query, key, value, *extra):
            return call(query, key, value, *extra)

    with torch.no_grad():
        given = (*inputs(140, grad=False), *more(140))
        program = torch.export.export(Model(), given)
        helpers.assert_close(program.module()(*given), call(*given), 1e-5)


@pytest.mark.parametrize("name", ["causal", "nystrom"])
def test_export_with_a_free_length(name):
    call, _ = CALLS[name]

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return call(query, key, value)

    length = torch.export.Dim("length", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(
            Model(), inputs(140, grad=False), dynamic_shapes=[{2: length}] * 3
        )
        for n in LENGTHS[:3]:
            tensors = inputs(n, grad=False)
            helpers.assert_close(program.module()(*tensors), call(*tensors), 1e-5)


def hybrid(merge):
    return HybridAttention(16, 2, 3, window=5, merge=merge, rotary=10_000.0)


def export(module, given, dims, **options):
    """A program with free dimensions, made with gradients on as a user would."""
    free = {name: dims for name in given}
    return torch.export.export(module, (), given, dynamic_shapes=free, **options).module()


@pytest.mark.skipif("cpu" not in helpers.BACKENDS, reason="C++ runs the whole call")
@pytest.mark.parametrize(
    "case", ["slots", "mass", "gate", "slots-masked", "gate-masked", "gate-masked-strict"]
)
def test_export_of_a_hybrid_module_frees_batch_and_length(case):
    merge, masked, strict = case.split("-")[0], "masked" in case, "strict" in case
    module = hybrid(merge)

    def given(batch, n):
        lengths = torch.tensor([[0], [n], [1], [n // 2]])[:batch]
        mask = {"key_mask": torch.arange(n) < lengths} if masked else {}
        return {"x": helpers.randn(batch, n, 16)} | mask

    dims = {n: torch.export.Dim(name, min=2, max=999) for n, name in ((0, "batch"), (1, "length"))}
    program = export(module, given(3, 37), dims, strict=strict)
    for batch, n in ((2, 2), (4, 11), (3, 140)):
        helpers.assert_close(program(**given(batch, n)), module(**given(batch, n)), 1e-5)


def test_export_of_a_composed_hybrid_with_a_key_mask_is_refused():
    module = hybrid("slots").double()  # float64 is PyTorch's
    given = {"x": helpers.randn(2, 37, 16).double(), "key_mask": torch.arange(37).expand(2, 37) > 3}
    with pytest.raises(NotImplementedError, match="cu_seqlens: expected None under torch.export"):
        export(module, given, None)


def test_compiled_with_checkpoints_and_autocast():
    from torch.utils.checkpoint import checkpoint

    mask = compiled_window(140)

    def step(query, key, value, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(sparse, query * 1.0, key, value, mask, use_reentrant=False)

    leaves = inputs(140, grad=True)
    torch._dynamo.reset()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, mask)
    wanted = step(*leaves, mask)
    assert out.dtype == torch.bfloat16
    helpers.assert_close(out, wanted, 1e-2)
    for a, b in zip(
        torch.autograd.grad(out.float().sum(), leaves),
        torch.autograd.grad(wanted.float().sum(), leaves),
        strict=True,
    ):
        helpers.assert_close(a, b, 2e-2)


def test_a_second_derivative_is_refused_when_compiled():
    leaves = inputs(40, grad=True)
    torch._dynamo.reset()
    out = torch.compile(sparse, fullgraph=True, backend="aot_eager")(*leaves)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        grad.sum().backward()
