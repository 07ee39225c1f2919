"""Packed sequences, cross-attention, and modules in the place of a projection."""

from __future__ import annotations

import pytest
import torch

from flashmark import masks
from flashmark.nn import BlockSparseAttention, CrossAttention, HybridAttention
from tests import helpers
from tests.nn.test_cache import MODULES, WIDTH, made

LENGTHS = [7, 1, 0, 13, 4]
BOUNDS = torch.tensor([0, 7, 8, 8, 21, 25], dtype=torch.int32)


@pytest.mark.parametrize("name", [*MODULES, "pinned", "bidirectional"])
def test_packed_sequences_are_as_if_alone(name):
    torch.manual_seed(0)
    if name == "pinned":
        module = BlockSparseAttention(WIDTH, 4, mask=masks.pinned(3), rotary=100.0)
    elif name == "bidirectional":
        module = BlockSparseAttention(WIDTH, 4, is_causal=False)
    else:
        module = made(name).requires_grad_()
    x = helpers.randn(1, sum(LENGTHS), WIDTH, grad=True)
    out = module(x, cu_seqlens=BOUNDS)
    alone = torch.cat([module(part) for part in x.split(LENGTHS, 1) if part.shape[1]], 1)
    helpers.assert_close(out, alone, 1e-5)
    d_out = helpers.randn(*out.shape, seed=3)
    for a, b in zip(*(torch.autograd.grad(y, x, d_out) for y in (out, alone)), strict=True):
        helpers.assert_close(a, b, 1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cu_seqlens": BOUNDS.long()}, TypeError, "cu_seqlens: expected an int32 tensor"),
        ({"cu_seqlens": BOUNDS[:1]}, ValueError, r"cu_seqlens: expected shape \(S \+ 1,\)"),
        ({"cu_seqlens": BOUNDS[:-1]}, ValueError, "cu_seqlens: expected numbers rising from 0 to"),
        (
            {"cu_seqlens": BOUNDS, "key_mask": torch.ones(1, 25).bool()},
            ValueError,
            "key_mask: expected None with cu_seqlens, got one",
        ),
    ],
)
@pytest.mark.parametrize("name", ["exact", "nystrom", "slots"])
def test_bad_bounds(name, options, error, words):
    with pytest.raises(error, match=words):
        made(name)(helpers.randn(1, 25, WIDTH), **options)


def test_a_cache_takes_no_packed_sequences():
    module = made("slots")
    with pytest.raises(ValueError, match="cache: expected None with cu_seqlens"):
        module(helpers.randn(1, 25, WIDTH), cu_seqlens=BOUNDS, cache=module.init_cache(1))


@pytest.mark.parametrize("lengths", [[9, 9], [4, 0]], ids=str)
def test_cross_attention_is_softmax_over_the_memory(lengths):
    torch.manual_seed(0)
    module = CrossAttention(WIDTH, 4, 24, num_kv_heads=2).double()
    x, memory = (helpers.randn(2, n, w, dtype=torch.float64) for n, w in ((5, WIDTH), (9, 24)))
    # padded on the left; what is padded may hold anything
    key_mask = torch.arange(9).flip(0) < torch.tensor(lengths)[:, None]
    out = module(x, memory.masked_fill(~key_mask[..., None], torch.nan), key_mask=key_mask)
    for row, n in enumerate(lengths):
        query = module.query(x[row]).unflatten(-1, (4, 8)).transpose(0, 1)
        key, value = module.key_value(memory[row, 9 - n :]).unflatten(-1, (2, 2, 8)).unbind(1)
        key, value = (y.transpose(0, 1).repeat_interleave(2, 0) for y in (key, value))
        weights = (query @ key.mT / 8**0.5).softmax(-1)
        expected = module.out((weights @ value).transpose(0, 1).flatten(1))
        helpers.assert_close(out[row], expected, 1e-10)
    read = module.read(memory, key_mask)
    helpers.assert_identical(module(x, read), module(x, memory, key_mask=key_mask))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: m(x, x[..., :7]), ValueError, r"memory: expected shape \(B, N, 32\)"),
        (lambda m, x: m(x, x[:1]), ValueError, "memory: expected a batch of 2 like x, got 1"),
        (
            lambda m, x: m(x, m.read(x), key_mask=torch.ones(2, 3).bool()),
            ValueError,
            "key_mask: expected None with what `read` returned",
        ),
        (lambda m, x: CrossAttention(32, 5), ValueError, "num_heads: expected a divisor"),
        (lambda m, x: CrossAttention(32, 4, num_kv_heads=3), ValueError, "num_kv_heads: expected"),
    ],
)
def test_bad_memories(call, error, words):
    with pytest.raises(error, match=words):
        call(CrossAttention(WIDTH, 4), helpers.randn(2, 3, WIDTH))


def test_one_mask_for_one_call():
    module, x = made("exact"), helpers.randn(2, 9, WIDTH)
    lengths = torch.tensor([2, 4])
    mask = masks.causal() & masks.pinned(lengths)
    for row, n in enumerate([2, 4]):
        module.mask = masks.causal() & masks.pinned(n)
        alone = module(x[row : row + 1])
        module.mask = masks.causal()
        helpers.assert_close(module(x, mask=mask)[row], alone[0], 1e-5)
    with pytest.raises(ValueError, match="mask: expected None with a cache"):
        module(x, mask=mask, cache=module.init_cache(2, 9))


class Wrapped(torch.nn.Module):
    """A projection without a `weight` of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["exact", "nystrom-decay", "gate"])
def test_a_wrapped_projection_decodes(name, dtype):
    module, x = made(name).to(dtype), helpers.randn(2, 9, WIDTH).to(dtype)
    module.qkv = Wrapped(module.qkv)
    cache = module.init_cache(2, 9)
    parts = [module(part, cache=cache) for part in x.split([6, 1, 2], 1)]
    helpers.assert_close(torch.cat(parts, 1), module(x), 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_a_hybrid_of_near_tokens_is_exact_attention(rotary_dim):
    """With all of a head rotated, too: then landmarks read the keys before rotation."""
    torch.manual_seed(0)
    exact = BlockSparseAttention(WIDTH, 4, num_kv_heads=2, rotary=100.0, rotary_dim=rotary_dim)
    hybrid = HybridAttention(
        WIDTH, 4, 3, window=20, num_kv_heads=2, rotary=100.0, rotary_dim=rotary_dim
    )
    hybrid.load_state_dict(exact.state_dict(), strict=False)
    x = helpers.randn(2, 40, WIDTH)
    helpers.assert_close(hybrid(x), exact(x), 1e-5)


@torch.no_grad()
def test_a_hybrid_with_all_of_a_head_rotated_depends_on_distances_only():
    torch.manual_seed(0)
    module = HybridAttention(WIDTH, 4, 3, window=4, rotary=100.0, rotary_dim=8)
    x = helpers.randn(2, 30, WIDTH)
    moved = module.init_cache(2)
    moved.length += 1000
    helpers.assert_close(module(x, cache=moved), module(x), 1e-4)
    cache = module.init_cache(2)
    parts = [module(part, cache=cache) for part in x.split([13, 1, 1, 15], 1)]
    helpers.assert_close(torch.cat(parts, 1), module(x), 1e-5)
