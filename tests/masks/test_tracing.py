"""Expressions and BlockMasks through torch.compile, torch.export and saved programs."""

from __future__ import annotations

import io

import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import flashmark
from flashmark import masks
from tests import helpers

pytestmark = pytest.mark.plain_empty  # Dynamo would trace the filling

N = 64
WINDOW = masks.causal() & masks.sliding_window(9)
IDS = torch.arange(N) // 20


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def inputs(n=N):
    return helpers.qkv(1, 2, n, 8, grad=False)


def attend(query, key, value, mask):
    return flashmark.block_sparse_attention(query, key, value, mask)


def inside(query, key, value, w, p):
    mask = masks.causal() & masks.sliding_window(w) | masks.prefix(p)
    return attend(query, key, value, mask)


def chosen(query, key, value, kind, size):
    mask = masks.causal()
    if kind == "chunks":
        mask = masks.local_chunks(size)
    elif kind == "dilated":
        mask = mask & (masks.dilated(size) | masks.diagonal())
    elif kind == "pinned":
        mask = mask & masks.pinned(size)
    return attend(query, key, value, mask)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_an_expression_is_built_of_integer_arguments(dynamic):
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for w, p in ((16, 4), (9, 4), (9, 0), (30, 11)):
        helpers.assert_close(compiled(*inputs(), w, p), inside(*inputs(), w, p), 1e-6)


@pytest.mark.parametrize("kind", ["causal", "chunks", "dilated", "pinned"])
def test_expressions_of_every_kind_may_be_written_inside(kind):
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    for size in (5, 16):
        helpers.assert_close(compiled(*inputs(), kind, size), chosen(*inputs(), kind, size), 1e-6)


def test_not_is_written_inside_with_a_graph_break():
    """Dynamo has no `~` for objects of users."""

    def call(query, key, value):
        return attend(
            query, key, value, masks.causal() & ~masks.sliding_window(9) | masks.prefix(1)
        )

    compiled = torch.compile(call, backend="aot_eager")
    helpers.assert_close(compiled(*inputs()), call(*inputs()), 1e-6)


def test_gradients_through_an_expression_written_inside():
    leaves = helpers.qkv(1, 2, N, 8)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    for call in (compiled, inside):
        call(*leaves, 9, 2).square().sum().backward()
        if call is compiled:
            grads = [x.grad.clone() for x in leaves]
            for x in leaves:
                x.grad = None
    for got, x in zip(grads, leaves, strict=True):
        helpers.assert_close(got, x.grad, 1e-6)


def test_an_equal_expression_needs_no_new_graph():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(*inputs(), masks.causal() & masks.sliding_window(9))
    assert counters["stats"]["unique_graphs"] == 1


#: what is evaluated at each call: the graph breaks there
EVALUATED = {
    "documents": lambda ids: masks.causal() & masks.documents(ids),
    "function": lambda ids: masks.mask_mod(lambda b, h, q, kv: (ids[q] == ids[kv]) & (kv <= q)),
}


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("name", EVALUATED)
def test_an_expression_of_tensors_is_evaluated_at_each_call(name, where):
    ids, make = IDS.clone(), EVALUATED[name]
    mask = make(ids)

    def call(query, key, value, ids):
        return attend(query * 1.0, key, value, make(ids) if where == "inside" else mask) * 2.0

    compiled = torch.compile(call, backend="aot_eager")
    for size in (20, 7, 20):
        ids.copy_(torch.arange(N) // size)
        helpers.assert_close(compiled(*inputs(), ids), call(*inputs(), ids), 1e-6)


def test_an_expression_of_tensors_in_one_graph_is_refused_with_the_way_out():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="evaluated at each call.*compile_mask"):
        compiled(*inputs(), EVALUATED["documents"](IDS))


class Holding(torch.nn.Module):
    """A layer that holds its mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, query, key, value):
        return attend(query, key, value, self.mask) * 1.0


class Building(torch.nn.Module):
    """A layer that builds its mask."""

    def __init__(self, window):
        super().__init__()
        self.window = window

    def forward(self, query, key, value):
        mask = masks.causal() & (masks.sliding_window(self.window) | masks.prefix(3))
        return attend(query, key, value, mask)


class Taking(torch.nn.Module):
    def forward(self, query, key, value, mask):
        return attend(query, key, value, mask)


def block_mask(mask, n=N):
    return masks.compile_mask(mask, 1, 1, n, n, device="cpu", block_size=16)


MODULES = {
    "expression": lambda: (Holding(WINDOW), ()),
    "causal": lambda: (Holding(masks.causal()), ()),
    "block-mask": lambda: (Holding(block_mask(WINDOW)), ()),
    "block-mask-of-documents": lambda: (Holding(block_mask(masks.documents(IDS))), ()),
    "built": lambda: (Building(9), ()),
    "argument": lambda: (Taking(), (block_mask(WINDOW),)),
}


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("name", MODULES)
def test_exported_and_loaded_module_gives_the_same(name, strict):
    module, more = MODULES[name]()
    given = (*inputs(), *more)
    program = torch.export.export(module, given, strict=strict)  # before its first run
    wanted = module(*given)
    helpers.assert_close(program.module()(*given), wanted, 1e-6)
    helpers.assert_close(saved_and_loaded(program).module()(*given), wanted, 1e-6)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("number", ["batch", "heads"])
def test_export_with_an_expression_and_free_numbers_of_samples_or_heads(number, strict):
    """Positions alone decide such a mask, so that neither is fixed by it."""
    dim = ["batch", "heads"].index(number)
    free = [{dim: torch.export.Dim("n", min=1, max=99)}] * 3
    given = helpers.qkv(3, 3, N, 8, grad=False)
    program = torch.export.export(Building(9), given, dynamic_shapes=free, strict=strict)
    for n in (1, 2, 7):
        other = helpers.qkv(*((n, 3) if number == "batch" else (3, n)), N, 8, grad=False)
        helpers.assert_close(program.module()(*other), Building(9)(*other), 1e-6)


def test_batches_of_any_size_share_two_graphs():
    compiled = torch.compile(Building(9), fullgraph=True, backend="aot_eager")
    for batch in (3, 2, 5, 7):
        given = helpers.qkv(batch, 2, N, 8, grad=False)
        helpers.assert_close(compiled(*given), Building(9)(*given), 1e-6)
    assert counters["stats"]["unique_graphs"] == 2


def test_expression_among_fake_tensors():
    """As memory is estimated: all that a call makes is fake as well, and nothing fake is kept."""
    flashmark.masks.cache._remembered.cache_clear()
    with FakeTensorMode():
        query, key, value = (x.requires_grad_() for x in inputs())
        out = Building(9)(query, key, value)
        out.sum().backward()
        assert out.shape == query.shape and query.grad.shape == query.shape
    block = block_mask(masks.causal() & (masks.sliding_window(9) | masks.prefix(3)))
    helpers.assert_close(Building(9)(*inputs()), attend(*inputs(), block), 1e-6)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_export_leaves_nothing_fake_behind(strict):
    flashmark.masks.cache._remembered.cache_clear()
    torch.export.export(Building(11), inputs(), strict=strict)
    helpers.assert_close(
        Building(11)(*inputs()),
        attend(
            *inputs(), block_mask(masks.causal() & (masks.sliding_window(11) | masks.prefix(3)))
        ),
        1e-6,
    )


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_export_of_an_expression_of_tensors_is_refused(strict):
    with pytest.raises((NotImplementedError, RuntimeError), match="compile_mask"):
        torch.export.export(Holding(masks.documents(IDS)), inputs(), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_exported_program_takes_another_mask_of_the_same_shape(strict):
    """Lists of other lengths: their sizes are left free."""
    first = block_mask(WINDOW)
    free = torch.export.Dim.AUTO
    shapes = [None] * 3 + [[{n: free for n in range(t.dim())} for t in first.tensors()]]
    program = torch.export.export(
        Taking(), (*inputs(), first), dynamic_shapes=shapes, strict=strict
    )
    loaded = saved_and_loaded(program).module()
    for mask in (WINDOW, masks.causal() & masks.documents(IDS), masks.dilated(3)):
        given = (*inputs(), block_mask(mask))
        helpers.assert_close(loaded(*given), attend(*given), 1e-6)


def test_another_block_mask_needs_no_third_graph():
    """The first one, and all others: their lists have other lengths."""
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for window in (50, 90, 130, 75):
        mask = masks.causal() & masks.sliding_window(window)
        given = (*inputs(256), block_mask(mask, 256))
        helpers.assert_close(compiled(*given), attend(*given), 1e-6)
    assert counters["stats"]["unique_graphs"] <= 2


def test_structure_of_a_block_mask_survives_json():
    spec = pytree.tree_structure({"mask": block_mask(WINDOW), "x": 1})
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
