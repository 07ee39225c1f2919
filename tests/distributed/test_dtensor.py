"""DTensors through the public functions, and modules over several processes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from flashmark import (
    block_scores,
    block_sparse_attention,
    block_topk_attention,
    compile_mask,
    hybrid_attention,
    landmark_core,
    nystrom_attention,
    routed_attention,
)
from flashmark.masks import causal, dense, documents
from tests import helpers

BATCH, HEADS, KV_HEADS, N = 3, 8, 4, 50


def placed(layout: str):
    """(mesh, placements): one letter a dimension, of batch, heads or nothing divided."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    by_letter = {"B": Shard(0), "H": Shard(1), "R": Replicate()}
    shape = (dist.get_world_size(),) if len(layout) == 1 else (2, 2)
    return init_device_mesh("cpu", shape), [by_letter[x] for x in layout]


def inputs():
    shapes = ((HEADS, 8), (KV_HEADS, 8), (KV_HEADS, 4))
    return [helpers.randn(BATCH, h, N, d, seed=n) for n, (h, d) in enumerate(shapes)]


def compare(operator, sharded: dict, replicated: dict, plain: dict, layout: str) -> None:
    """Outputs, and gradients of everything that has one, against one process."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh, placements = placed(layout)

    def leaf(x):
        return x.detach().clone().requires_grad_(x.is_floating_point())

    def run(arguments: dict):
        outs = [x for x in tree_leaves(operator(**arguments)) if x.is_floating_point()]
        weights = [helpers.randn(*x.shape, seed=50 + n) for n, x in enumerate(outs)]
        leaves = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        leaves = [x for x in leaves if x.requires_grad]
        if isinstance(outs[0], DTensor):
            weights = [
                distribute_tensor(w, mesh, x.placements) for w, x in zip(weights, outs, strict=True)
            ]
        loss = sum((x * w).sum() for x, w in zip(outs, weights, strict=True))
        return [*outs, *torch.autograd.grad(loss, leaves)]

    def over(x, where):
        return distribute_tensor(x.detach(), mesh, where).requires_grad_(x.requires_grad)

    whole = tree_map(leaf, sharded | replicated) | plain
    wanted = run(whole)
    everywhere = [Replicate()] * mesh.ndim
    parts = tree_map(lambda x: over(x, placements), {name: whole[name] for name in sharded})
    parts |= tree_map(lambda x: over(x, everywhere), {name: whole[name] for name in replicated})
    found = run(parts | plain)
    assert found[0].placements == tuple(placements)
    assert len(found) == len(wanted)
    for number, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        helpers.assert_close(actual.full_tensor(), expected, 5e-5, f"result {number}")


def block_sparse_case(layout: str, which: str, dense_bias: bool) -> None:
    ids = torch.arange(N) // torch.tensor([[7], [20], [50]])
    own = helpers.randn(BATCH, HEADS, N, N, seed=9) > -0.5  # every sample and head has its mask
    mask = {
        "none": None,
        "causal": causal(),
        "documents": causal() & documents(ids),
        "own": dense(own),
        "compiled": compile_mask(dense(own[:1]), BATCH, HEADS, N, N, device="cpu", block_size=16),
    }[which]
    bias = (BATCH, 1, N, N) if dense_bias else (HEADS, 2 * N - 1)
    sharded = dict(zip(("query", "key", "value"), inputs(), strict=True))
    replicated = {"sinks": helpers.randn(HEADS, seed=5), "bias": helpers.randn(*bias, seed=6)}
    lengths = torch.tensor([N, 30, 41], dtype=torch.int32)
    plain = {"mask": mask, "return_lse": True, "kv_lengths": lengths}
    compare(block_sparse_attention, sharded, replicated, plain, layout)


LAYOUTS = [(2, "B"), (2, "H"), (2, "R"), (4, "BH"), (4, "HH"), (4, "RH")]


@pytest.mark.parametrize(
    ("ranks", "layout", "which"),
    [(2, "B", "documents"), (2, "H", "compiled"), (2, "R", "causal"), (4, "RH", "none")]
    + [(ranks, layout, "own") for ranks, layout in LAYOUTS],
)
def test_block_sparse_over_shards(started, ranks, layout, which):
    started(ranks).run(block_sparse_case, layout, which, which == "causal")


def nystrom_case(layout: str) -> None:
    sharded = dict(zip(("query", "key", "value"), inputs(), strict=True))
    marks, core = helpers.randn(KV_HEADS, 5, 8, seed=3), torch.eye(5).expand(KV_HEADS, 5, 5)
    state = tuple(helpers.randn(BATCH, KV_HEADS, 5, *d, seed=4) for d in ((), (4,)))
    replicated = {"landmarks": marks, "core": core, "state": state}
    replicated["decay"] = 0.1 * helpers.randn(KV_HEADS, 5, seed=7).abs()
    key_mask = helpers.randn(BATCH, N, seed=8) > -0.5
    plain = {"key_mask": key_mask, "return_state": True}
    compare(nystrom_attention, sharded, replicated, plain, layout)
    by_sample = {"landmarks": helpers.randn(BATCH, KV_HEADS, 5, 8, seed=3)}
    compare(nystrom_attention, sharded, by_sample, {}, layout)


def hybrid_case(layout: str, merge: str) -> None:
    sharded = dict(zip(("query", "key", "value"), inputs(), strict=True))
    replicated = {"landmarks": helpers.randn(KV_HEADS, 5, 8, seed=3)}
    if merge == "gate":
        replicated["gate"] = helpers.randn(1, HEADS, 1, 1, seed=4).sigmoid()
    plain = {"window": 8, "merge": merge, "return_state": True}
    compare(hybrid_attention, sharded, replicated, plain, layout)
    if merge == "gate":
        replicated["gate"] = helpers.randn(HEADS, 1, 1, seed=4).sigmoid()
        compare(hybrid_attention, sharded, replicated, plain, layout)


def routed_case(layout: str) -> None:
    sharded = dict(zip(("query", "key", "value"), inputs(), strict=True))
    replicated = {"sinks": helpers.randn(HEADS, seed=5)}
    marks = helpers.randn(KV_HEADS, 3, 8, seed=3)
    key_mask = helpers.randn(BATCH, N, seed=8) > -0.5
    plain = {"landmarks": marks, "block_size": 8, "top_k": 2, "key_mask": key_mask}
    compare(routed_attention, sharded, replicated, plain | {"return_state": True}, layout)
    own = block_scores(sharded["query"], sharded["key"], block_size=8)
    compare(
        routed_attention, sharded, replicated, {"scores": own, "block_size": 8, "top_k": 2}, layout
    )
    chosen = own.argmax(-1, keepdim=True).masked_fill(own.amax(-1, keepdim=True).isinf(), -1)
    plain = {"indices": chosen, "block_size": 8, "near": 1, "return_lse": True}
    compare(block_topk_attention, sharded, replicated, plain, layout)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_routed_over_shards(started, ranks, layout):
    started(ranks).run(routed_case, layout)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_nystrom_over_shards(started, ranks, layout):
    started(ranks).run(nystrom_case, layout)


@pytest.mark.parametrize("merge", ["slots", "gate"])
@pytest.mark.parametrize(("ranks", "layout"), [(2, "B"), (2, "H"), (4, "BH")])
def test_hybrid_over_shards(started, ranks, layout, merge):
    started(ranks).run(hybrid_case, layout, merge)


def core_case() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, _ = placed("H")
    marks = helpers.randn(KV_HEADS, 5, 8, seed=3, grad=True)
    (wanted,) = torch.autograd.grad(landmark_core(marks).square().sum(), marks)
    sharded = distribute_tensor(marks.detach(), mesh, [Shard(0)]).requires_grad_()
    core = landmark_core(sharded)
    assert core.placements == (Shard(0),)
    (found,) = torch.autograd.grad(core.square().sum(), sharded)
    helpers.assert_close(core.full_tensor(), landmark_core(marks), 1e-6)
    helpers.assert_close(found.full_tensor(), wanted, 5e-5)


def test_the_core_of_shards_of_heads(started):
    started(2).run(core_case)


def errors_case() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, _ = placed("H")
    query, key, value = inputs()

    def over(x, dim):
        return distribute_tensor(x, mesh, [Shard(dim)])

    with pytest.raises(ValueError, match="query: expected shards of dimension 0"):
        block_sparse_attention(*(over(x, 2) for x in (query, key, value)))
    tensors = [over(x, 1) for x in (query, key[:, :1], value[:, :1])]
    with pytest.raises(ValueError, match="key: expected a number of heads that 2 shards divide"):
        block_sparse_attention(*tensors)
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0.0"):
        block_sparse_attention(*(over(x, 1) for x in (query, key, value)), dropout_p=0.5)


def test_errors_name_the_argument(started):
    started(2).run(errors_case)


def net() -> nn.Module:
    from flashmark.nn import BlockSparseAttention, HybridAttention, NystromAttention

    torch.manual_seed(0)
    options = {"num_kv_heads": 2}
    layers = nn.Sequential(
        BlockSparseAttention(32, 4, rotary=1e4, sinks=True, bias=True, **options),
        NystromAttention(32, 4, 6, decay=True, **options),
        HybridAttention(32, 4, 6, window=8, merge="gate", **options),
        HybridAttention(32, 4, 6, window=8, merge="slots", rotary=1e4, **options),
        HybridAttention(32, 4, 6, window=8, merge="gate", gate="head", **options),
    )
    for parameter in layers.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return layers


def module_case(style: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    from flashmark.distributed import head_order, tensor_parallel_plan

    rank, ranks = dist.get_rank(), dist.get_world_size()
    # float64: what reaches the landmarks through five layers is small
    whole = net().double()
    x, weights = (helpers.randn(2, 40, 32, seed=n, dtype=torch.float64) for n in range(2))
    parts = copy.deepcopy(whole)
    out = whole(x)
    (out * weights).sum().backward()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "heads"))
    if "tp" in style:
        parts = parallelize_module(parts, mesh["heads"], tensor_parallel_plan(parts))
    here, copies = slice(None), 1
    if "fsdp" in style:
        data = mesh["data"] if "tp" in style else init_device_mesh("cpu", (ranks,))
        for layer in parts:
            fully_shard(layer, mesh=data)
        fully_shard(parts, mesh=data)
        copies = data.size()
        here = slice(data.get_local_rank(), data.get_local_rank() + 1)  # one sample a rank
    found = parts(x[here])
    (found * weights[here]).sum().backward()
    helpers.assert_close(found, out[here], 1e-12, "out")
    order = head_order(4, 2, 8, 2)
    for (name, parameter), reference in zip(
        parts.named_parameters(), whole.parameters(), strict=True
    ):
        found, wanted = parameter.grad, reference.grad
        found = found.full_tensor() if isinstance(found, DTensor) else found
        if "tp" in style and ".qkv." in name:
            wanted = wanted[order]
        helpers.assert_close(found * copies, wanted, 1e-6, f"rank {rank}, {name}")


@pytest.mark.parametrize(("ranks", "style"), [(2, "tp"), (2, "fsdp"), (4, "tp-fsdp")])
def test_modules_over_processes(started, ranks, style):
    """Tensor parallel, FSDP2, and one inside the other."""
    started(ranks).run(module_case, style)


def decode_case() -> None:
    """Caches of tensor-parallel modules hold the heads of their rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from flashmark.distributed import HeadwiseParallel

    mesh = init_device_mesh("cpu", (2,))
    x = helpers.randn(2, 12, 32)
    for layer in net():
        with torch.no_grad():
            wanted = layer(x)
            part = parallelize_module(layer, mesh, HeadwiseParallel())
            cache = part.init_cache(2, 12)
            found = torch.cat([part(x[:, :7], cache=cache), part(x[:, 7:], cache=cache)], 1)
        helpers.assert_close(found, wanted, 1e-5, type(layer).__name__)


def test_decoding_under_tensor_parallelism(started):
    started(2).run(decode_case)


def test_nothing_of_dtensor_is_imported_before_it_is_used():
    code = (
        "import flashmark, flashmark.distributed, sys, torch;"
        "q = torch.zeros(1, 1, 4, 4); flashmark.block_sparse_attention(q, q, q);"
        "print('torch.distributed.tensor' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
