"""The modules in training: gradients at every length, checkpointing, optimisers, adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from flashmark.nn import KeyValueCache
from tests import helpers
from tests.nn.test_modules import MODULES, WIDTH

WINDOW = 5  # of the hybrid modules: 10 tokens are all near


@pytest.mark.parametrize("length", [0, 1, 4, 9, 10, 11, 23])
@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_has_a_gradient(name, length):
    module = MODULES[name]()
    module(helpers.randn(2, length, WIDTH)).square().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())
    if name in ("slots", "mass", "gate", "gate-head"):
        assert bool(found["landmarks"].any()) == (length > 2 * WINDOW)


@pytest.mark.parametrize("name", ["nystrom", "slots", "mass", "gate"])
def test_every_parameter_has_a_gradient_where_no_token_takes_part(name):
    module = MODULES[name]()
    key_mask = torch.zeros(2, 7, dtype=torch.bool)
    module(helpers.randn(2, 7, WIDTH), key_mask=key_mask).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["nystrom", "slots", "mass", "gate"])
def test_gradients_of_half_landmarks_are_rounded_once(name, dtype):
    module = MODULES[name]().to(dtype)
    x = helpers.randn(2, 23, WIDTH, dtype=dtype)

    def attend(landmarks):
        return torch.func.functional_call(module, {"landmarks": landmarks}, (x,))

    helpers.check_half_landmarks(attend, module.landmarks.shape, dtype)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("name", ["nystrom", "slots", "mass", "gate"])
def test_steps_of_a_fused_optimiser_with_checkpoints(name, use_reentrant):
    """Whatever ran without gradients between two steps."""
    plain = MODULES[name]()
    found = {False: copy.deepcopy(plain), True: copy.deepcopy(plain)}
    x, losses = helpers.randn(2, 23, WIDTH), {False: [], True: []}
    for checkpointed, module in found.items():
        step = torch.optim.AdamW(module.parameters(), lr=0.02, fused=True)
        for _ in range(4):
            leaf = x.clone().requires_grad_()
            if checkpointed:
                out = checkpoint(module, leaf, use_reentrant=use_reentrant)
            else:
                out = module(leaf)
            loss = (out - 1).square().mean()
            step.zero_grad()
            loss.backward()
            step.step()
            with torch.no_grad():
                losses[checkpointed].append(float((module(x) - 1).square().mean()))
    # a reentrant checkpoint runs first without gradients, by other C++ operators
    rounding = 1e-4 if use_reentrant else 0.0
    assert losses[True] == pytest.approx(losses[False], rel=rounding, abs=0.0)
    assert len(set(losses[True])) == 4


def in_steps(module, x):
    """The outputs of a prompt and of single tokens, with a cache."""
    with torch.no_grad():
        cache = module.init_cache(x.shape[0], x.shape[1])
        return torch.cat([module(part, cache=cache) for part in x.split([8, 1, 1, 4], 1)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["exact", "nystrom", "slots", "mass"])
def test_low_rank_adapters_on_the_projections(name, dtype):
    peft = pytest.importorskip("peft")
    base = torch.nn.ModuleDict({"attention": MODULES[name]()}).to(dtype)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=False)
    module = peft.inject_adapter_in_model(config, copy.deepcopy(base))["attention"]
    x = helpers.randn(2, 14, WIDTH).to(dtype)
    with torch.no_grad():
        whole = module(x)
        assert not torch.equal(whole, base["attention"](x))
    helpers.assert_close(in_steps(module, x), whole, 1e-5 if dtype == torch.float32 else 2e-2)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    module(x).float().square().sum().backward()
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)


class Stored(torch.nn.Module):
    """A linear layer with weights in a type that numbers are not computed in."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.parametrize("name", ["exact", "window", "nystrom", "slots"])
def test_projections_stored_in_8_bits(name, dtype):
    module, x = MODULES[name](), helpers.randn(2, 14, WIDTH)
    module.qkv.weight.data.mul_(8)  # so that int8 keeps something
    module.qkv = Stored(module.qkv, dtype)
    with torch.no_grad():
        helpers.assert_close(in_steps(module, x), module(x), 1e-5)


class NoTransfers(TorchFunctionMode):
    """Fails where a Python number becomes a tensor, or a tensor a Python number."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("as_tensor", "tensor", "item", "tolist", "__bool__", "__int__"), name
        return function(*args, **(kwargs or {}))


def test_writing_to_a_cache_does_not_wait_for_the_device():
    cache = KeyValueCache(2, 1, 9, 4, None, dtype=torch.float32, device=torch.device("cpu"))
    key, value = helpers.randn(2, 1, 3, 4), helpers.randn(2, 1, 3, 4)
    counts = torch.tensor([3, 1], dtype=torch.int32)
    with NoTransfers():
        cache.append(key, value, cache.first_column(3), 3)
        cache.append(key, value, cache.first_column(3), counts)
    assert cache.length.tolist() == [6, 4]
    helpers.assert_identical(cache.key[0, :, :6], torch.cat([key[0], key[0]], 1))
    helpers.assert_identical(cache.value[1, :, :4], torch.cat([value[1], value[1, :, :1]], 1))
