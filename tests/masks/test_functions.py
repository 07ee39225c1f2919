"""Mask functions: scalars in, one bool out, as under FlexAttention's vmap."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, noop_mask

from flashmark import masks
from tests.masks.watching import LargestOutput

pytestmark = pytest.mark.filterwarnings("ignore:.*performance drop")

N, M = 70, 90
GENERATOR = torch.Generator().manual_seed(0)
FLAGS = torch.rand(M, 6, generator=GENERATOR) > 0.6
POINTS = torch.rand(M, 3, generator=GENERATOR)
OWNER = torch.randint(0, 3, (2, M), generator=GENERATOR)
TABLE = torch.rand(3, M, M, generator=GENERATOR) > 0.5
LIMIT = torch.tensor([[5, 40], [80, 3], [1, 9]])
ORDER = torch.randperm(M, generator=GENERATOR)


class Window:
    """A callable object with state."""

    def __init__(self, size):
        self.size = size

    def __call__(self, b, h, q, kv):
        return (q - kv).abs() < self.size


def nested(b, h, q, kv):
    inner = torch.vmap(lambda flag: flag & (q >= kv))(FLAGS[q])
    return inner.any()


FUNCTIONS = {
    "comparison": lambda b, h, q, kv: q >= kv,
    "any-of-rows": lambda b, h, q, kv: (FLAGS[q] & FLAGS[kv]).any(),
    "all-of-rows": lambda b, h, q, kv: (FLAGS[q] <= FLAGS[kv]).all(-1),
    "distance": lambda b, h, q, kv: (POINTS[q] - POINTS[kv]).norm() < 0.5,
    "product": lambda b, h, q, kv: POINTS[q] @ POINTS[kv] > 0.7,
    "chained": lambda b, h, q, kv: OWNER[b % 2][q] == OWNER[b % 2][kv],
    "table": lambda b, h, q, kv: TABLE[h][q][kv],
    "table-at-once": lambda b, h, q, kv: TABLE[h, q, kv],
    "stack": lambda b, h, q, kv: torch.stack([q >= kv, kv < 3, q == 5]).any(0),
    "cat": lambda b, h, q, kv: torch.cat([q[None] - kv[None], kv[None] - q[None]]).max() < 9,
    "where": lambda b, h, q, kv: torch.where(h == 0, q >= kv, kv < 10),
    "indirect": lambda b, h, q, kv: ORDER[ORDER[q]] >= ORDER[kv],
    "number-and-scalar": lambda b, h, q, kv: POINTS[q, 0] < POINTS[kv, -1],
    "slice-and-scalar": lambda b, h, q, kv: (POINTS.T[:, q] < POINTS.T[..., kv]).any(),
    "slice-of-row": lambda b, h, q, kv: FLAGS[q, 1:4].any() & FLAGS[kv][None, 2:].all(),
    "list-and-scalar": lambda b, h, q, kv: FLAGS[q, torch.tensor([0, 2])].any() | (kv == q),
    "per-sample-and-head": lambda b, h, q, kv: kv < LIMIT[h, b % 2],
    "captured-scalar": lambda b, h, q, kv: q + LIMIT[0, 0] >= kv,
    "float-arithmetic": lambda b, h, q, kv: torch.sin(q * 0.3) > kv / M,
    "object": Window(7),
    "nested-vmap": nested,
    "everything": noop_mask,
    "constant": lambda b, h, q, kv: torch.tensor(True),
    "negative-index": lambda b, h, q, kv: FLAGS[q - M].any() & (kv > 0),
    "modes-of-flex": lambda b, h, q, kv: torch.logical_and(q >= kv, torch.eq(q // 8, kv // 8)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elements_are_those_of_flex_attention(name):
    fn, sizes = FUNCTIONS[name], (2, 3, N, M)
    wanted = create_mask(fn, *sizes, device="cpu") if name not in BEYOND else by_loop(fn, *sizes)
    assert torch.equal(masks.mask_mod(fn).to_dense(*sizes).expand(sizes), wanted)
    compiled = masks.compile_mask(masks.mask_mod(fn), *sizes, device="cpu", block_size=16)
    assert torch.equal(compiled.to_dense().expand(sizes), wanted)
    both = masks.sliding_window(30) & ~masks.mask_mod(fn)
    band = masks.sliding_window(30).to_dense(*sizes)
    compiled = masks.compile_mask(both, *sizes, device="cpu", block_size=(32, 16))
    assert torch.equal(compiled.to_dense().expand(sizes), band & ~wanted)


#: what PyTorch's own indexing under vmap does not take
BEYOND = {"slice-and-scalar", "slice-of-row", "list-and-scalar"}


def by_loop(fn, *sizes):
    out = torch.empty(sizes, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, sizes)):
        out[tuple(at)] = fn(*at)
    return out


LEADING = {
    "neither": (lambda b, h, q, kv: (FLAGS[q] & FLAGS[kv]).any(), (1, 1)),
    "sample": (lambda b, h, q, kv: OWNER[b % 2][q] == OWNER[b % 2][kv], (4, 1)),
    "head": (lambda b, h, q, kv: TABLE[h][q, kv], (1, 3)),
    "both": (lambda b, h, q, kv: torch.stack([q >= kv, b > h]).any(), (4, 3)),
    "only-at-later-keys": (lambda b, h, q, kv: (kv < 50) | (b == 3), (4, 1)),
    "hidden-in-a-table": (lambda b, h, q, kv: LIMIT.T[:, h].sum() > q + kv, (1, 3)),
}


@pytest.mark.parametrize("name", LEADING)
def test_samples_and_heads_are_told_apart_where_the_function_reads_them(name):
    fn, leading = LEADING[name]
    compiled = masks.compile_mask(masks.mask_mod(fn), 4, 3, N, N, device="cpu", block_size=32)
    assert compiled.shape == (*leading, N, N)
    wanted = create_mask(fn, 4, 3, N, N, device="cpu")
    assert torch.equal(compiled.to_dense().expand(4, 3, N, N), wanted)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in BEYOND])
def test_conversion_from_flex_attention(name):
    fn = FUNCTIONS[name]
    block_mask = create_block_mask(fn, 2, 3, N, M, device="cpu", BLOCK_SIZE=32)
    wanted = create_mask(fn, 2, 3, N, M, device="cpu")
    assert torch.equal(masks.from_flex(block_mask).to_dense(), wanted)


def test_function_of_parameters_builds_no_graph():
    weight = torch.nn.Parameter(POINTS.clone())
    mask = masks.mask_mod(lambda b, h, q, kv: (weight[q] * weight[kv]).sum() > 0.7)
    compiled = masks.compile_mask(mask, 1, 1, N, N, device="cpu", block_size=32)
    assert not any(t.requires_grad for t in compiled.tensors())
    assert torch.equal(compiled.to_dense()[0, 0], (POINTS @ POINTS.T > 0.7)[:N, :N])


def test_intermediate_results_stay_within_a_band():
    """Rows of 8 numbers at 2048 tokens: never 2048 x 2048 x 8 of them."""
    rows = torch.rand(2048, 8, generator=torch.Generator().manual_seed(1))
    mask = masks.mask_mod(lambda b, h, q, kv: (rows[q] * rows[kv]).amax() > 0.8)
    with LargestOutput() as largest:
        compiled = masks.compile_mask(mask, 1, 1, 2048, 2048, device="cpu")
    assert largest.elements <= 2048 * 2048 * 8 // 4
    kept = (rows[:64, None] * rows).amax(-1) > 0.8
    assert torch.equal(compiled.to_dense()[0, 0, :64], kept)


WRONG = {
    "a-row": (lambda b, h, q, kv: FLAGS[q], ValueError, r"expected one bool.*\(6,\)"),
    "an-integer": (lambda b, h, q, kv: q - kv, TypeError, "expected.*bool tensor, got torch.int64"),
    "a-number": (lambda b, h, q, kv: True, TypeError, "expected.*bool tensor, got bool"),
}


@pytest.mark.parametrize("name", WRONG)
def test_result_that_is_no_bool_is_refused(name):
    fn, error, match = WRONG[name]
    with pytest.raises(error, match=f"fn: {match}"):
        masks.compile_mask(masks.mask_mod(fn), 2, 2, N, N, device="cpu")


def test_control_flow_on_an_index_is_refused_by_vmap():
    """A branch on a value would be taken once for all: never a silent answer."""
    mask = masks.mask_mod(lambda b, h, q, kv: q >= kv if b == 0 else q < kv)
    for batch in (1, 2):
        with pytest.raises(RuntimeError, match="control flow"):
            masks.compile_mask(mask, batch, 1, N, N, device="cpu")
