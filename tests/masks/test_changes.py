"""A mask follows its tensors and functions at each call, however they changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashmark
from flashmark import masks
from flashmark.integrations.flex import flex_attention
from flashmark.nn import BlockSparseAttention
from tests import helpers

N = 48
BOOLS = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(0)) > 0.5


def padded(lengths):
    return torch.arange(N) < lengths[:, None]


#: name -> (expression of a tensor, the tensor first, its next contents)
TENSORS = {
    "documents": (masks.documents, torch.arange(N) // 9, torch.arange(N) // 20),
    "key-ids": (
        lambda ids: masks.documents(torch.arange(N) // 9, ids),
        torch.arange(N) // 9,
        torch.arange(N) // 20,
    ),
    "packed": (
        lambda ends: masks.packed(ends, mask=masks.causal()),
        torch.tensor([0, 10, N]),
        torch.tensor([0, 30, N]),
    ),
    "prefix": (masks.prefix, torch.tensor([5, 40]), torch.tensor([33, 2])),
    "lengths": (masks.key_padding, torch.tensor([5, 40]), torch.tensor([33, 2])),
    "bools": (
        masks.key_padding,
        padded(torch.tensor([5, 40])),
        padded(torch.tensor([33, 2])),
    ),
    "blocks": (
        lambda map: masks.blocks(map, 16),
        torch.eye(3, dtype=torch.bool),
        ~torch.eye(3, dtype=torch.bool),
    ),
    "dense": (masks.dense, BOOLS.clone(), ~BOOLS),
    "function": (
        lambda ids: masks.mask_mod(lambda b, h, q, kv: ids[q] == ids[kv]),
        torch.arange(N) // 9,
        torch.arange(N) // 20,
    ),
}


def swap_storage(tensor, new):
    tensor.data = new.clone()


WRITES = {
    "in-place": lambda tensor, new: tensor.copy_(new),
    "data": lambda tensor, new: tensor.data.copy_(new),
    "numpy": lambda tensor, new: tensor.numpy().__setitem__(..., new.numpy()),
    "other-storage": swap_storage,
}


def attend(mask, seed=0):
    query, key, value = helpers.qkv(2, 2, N, 8, grad=False, seed=seed)
    return flashmark.block_sparse_attention(query, key, value, mask)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", TENSORS)
def test_each_call_reads_the_tensor(name, write):
    make, first, second = TENSORS[name]
    tensor = first.clone()
    mask = make(tensor) & ~~masks.sliding_window(30)
    window = masks.sliding_window(30)
    helpers.assert_identical(attend(mask), attend(make(first.clone()) & window))
    WRITES[write](tensor, second)
    helpers.assert_identical(attend(mask), attend(make(second.clone()) & window))
    assert not torch.equal(attend(mask), attend(make(first.clone()) & window))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "function"])
def test_copies_have_tensors_of_their_own(name, copied):
    make, first, second = TENSORS[name]
    tensor = first.clone()
    mask = masks.causal() & make(tensor)
    attend(mask)
    twin = copied(mask)
    tensor.copy_(second)
    helpers.assert_identical(attend(twin), attend(masks.causal() & make(first.clone())))
    helpers.assert_identical(attend(copied(mask)), attend(masks.causal() & make(second.clone())))


def test_nothing_that_was_compiled_is_pickled():
    mask = masks.causal() & (masks.sliding_window(9) | masks.prefix(2))
    before = pickle.dumps(mask)
    attend(mask)
    assert pickle.dumps(mask) == before


def test_copied_module_follows_its_own_mask():
    ids = torch.arange(N) // 9
    module = BlockSparseAttention(16, 2, mask=masks.causal() & masks.documents(ids)).eval()
    x = helpers.randn(1, N, 16)
    with torch.no_grad():
        first, twin = module(x), copy.deepcopy(module)
        ids.fill_(0)
        helpers.assert_identical(twin(x), first)
        helpers.assert_identical(copy.deepcopy(module)(x), module(x))
        assert not torch.equal(module(x), first)


def test_function_reads_python_state_at_each_call():
    state = {"size": 3}
    mask = masks.causal() & masks.mask_mod(lambda b, h, q, kv: q - kv < state["size"])
    for size in (3, 11, 1):
        state["size"] = size
        helpers.assert_close(attend(mask), attend(masks.sliding_window(size, 0)), 1e-6)


@pytest.mark.parametrize("which", ["captured", "indices"])
def test_flex_attention_reads_its_block_mask_at_each_call(which):
    limit = torch.tensor(40)
    block_mask = create_block_mask(lambda b, h, q, kv: kv < limit, None, None, N, N, device="cpu")
    query, key, value = helpers.qkv(1, 2, N, 8, grad=False)
    flex_attention(query, key, value, block_mask=block_mask)
    wanted = masks.prefix(7)
    if which == "captured":
        limit.fill_(7)
    else:
        block_mask.kv_num_blocks.data.zero_()
        wanted = masks.prefix(0)
    got = flex_attention(query, key, value, block_mask=block_mask)
    helpers.assert_close(got, flashmark.block_sparse_attention(query, key, value, wanted), 1e-6)


def test_watching_modes_do_not_reach_what_is_remembered():
    """A first call with fake tensors leaves nothing fake behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask = masks.causal() & masks.sliding_window(13)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(2, 2, N, 8)
        assert flashmark.block_sparse_attention(query, query, query, mask).shape == query.shape
    assert attend(mask).isfinite().all()
