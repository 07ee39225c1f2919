"""Training on several processes: DistributedDataParallel and FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flashmark.nn import HybridAttention, NystromAttention

pytestmark = pytest.mark.plain_empty

WIDTH = 32
MODULES = {
    "nystrom": lambda: NystromAttention(WIDTH, 2, 6, decay=True),
    "slots": lambda: HybridAttention(WIDTH, 2, 6, window=8),
    "mass": lambda: HybridAttention(WIDTH, 2, 6, window=8, merge="mass"),
    "gate": lambda: HybridAttention(WIDTH, 2, 6, window=8, merge="gate"),
}
each_module = pytest.mark.parametrize("name", MODULES)


def _batches_of_any_length(name):
    """The gradient is that of both batches together; short batches use no landmark."""
    module = MODULES[name]()
    parallel = DistributedDataParallel(module)
    for step, length in enumerate((30, 5, 16, 17)):
        x = torch.randn(4, length, WIDTH, generator=torch.Generator().manual_seed(step))
        module.zero_grad()
        parallel(x.chunk(2)[dist.get_rank()]).square().mean().backward()
        found = {name: p.grad.clone() for name, p in module.named_parameters()}
        module.zero_grad()
        module(x).square().mean().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


@each_module
def test_data_parallel_batches_of_any_length(name, started):
    started(2).run(_batches_of_any_length, name)


def _sharded_steps(name):
    """Training and evaluation in turn, as without sharding."""
    plain, sharded = MODULES[name](), MODULES[name]()
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    x = torch.randn(2, 30, WIDTH, generator=torch.Generator().manual_seed(3))
    steps = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (plain, sharded)]
    for _ in range(3):
        evaluated = []
        for module, step in zip((plain, sharded), steps, strict=True):
            module.train()(x).square().mean().backward()
            step.step()
            step.zero_grad()
            with torch.no_grad():
                evaluated.append(module.eval()(x))
        torch.testing.assert_close(*evaluated, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        cache = sharded.init_cache(2)
        parts = [sharded(part, cache=cache) for part in x.split([20, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), plain(x), rtol=1e-3, atol=1e-4)


@each_module
def test_sharded_parameters_are_those_of_the_last_step(name, started):
    started(2).run(_sharded_steps, name)
