"""Derivatives of every kind around torch.compile: operators know no transform inside a graph."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import flashmark
from flashmark import masks
from flashmark.nystrom.landmark_core import init_landmarks
from tests import helpers

MARKS = init_landmarks(2, 4, 8, generator=torch.Generator().manual_seed(0))
ATTEND = {
    "block-sparse": lambda q, k, v: flashmark.block_sparse_attention(q, k, v, masks.causal()),
    "hybrid": lambda q, k, v: flashmark.hybrid_attention(q, k, v, MARKS, window=8),
}


@pytest.fixture(params=ATTEND)
def attend(request):
    torch._dynamo.reset()
    return ATTEND[request.param]


def inputs():
    return helpers.qkv(1, 4, 40, 8, kv_heads=2, grad=False)


def compiled(function):
    return torch.compile(function, backend="aot_eager")


def transforms(attend, key, value):
    def total(q):
        return attend(q, key, value).square().sum()

    return {
        "jvp": lambda q: torch.func.jvp(total, (q,), (q.cos(),))[1],
        "grad": torch.func.grad(total),
        "vmap": lambda q: torch.vmap(total)(torch.stack([q, -q])),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("attend", "where", "transform"),
    [("block-sparse", w, t) for w in ("outside", "inside") for t in ("jvp", "grad", "vmap")]
    + [("hybrid", "outside", "jvp"), ("hybrid", "inside", "grad")],
    indirect=["attend"],
)
def test_torch_func_and_compile(attend, transform, where):
    query, key, value = inputs()
    wanted = transforms(attend, key, value)[transform](query)
    if where == "outside":
        found = compiled(transforms(attend, key, value)[transform])(query)
    else:
        function = compiled(attend)
        function(query, key, value)  # a graph without transforms is there already
        found = transforms(function, key, value)[transform](query)
    helpers.assert_close(found, wanted, 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_forward_mode_of_a_compiled_function(attend):
    query, key, value = inputs()
    function = compiled(attend)
    function(query, key, value)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query.cos())
        found, wanted = (
            forward_ad.unpack_dual(f(dual, key, value)).tangent for f in (function, attend)
        )
    helpers.assert_close(found, wanted, 1e-6)
