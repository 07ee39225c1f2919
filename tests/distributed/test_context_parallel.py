"""A sequence shared out to processes: the outputs and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flashmark import (
    NystromState,
    block_sparse_attention,
    compile_mask,
    hybrid_attention,
    nystrom_attention,
)
from flashmark.distributed import (
    balance,
    context_parallel_block_sparse_attention,
    context_parallel_hybrid_attention,
    context_parallel_nystrom_attention,
    shard,
    token_bytes,
    unshard,
)
from flashmark.masks import causal, documents, mask_mod, prefix, sliding_window
from tests import helpers

N = 203  # tokens, in blocks of 16: the last one is ragged
DOCUMENTS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3]).repeat_interleave(16)[:N]
MASKS = {
    "causal": causal(),
    "window": causal() & sliding_window(40),
    "documents": causal() & documents(torch.stack([DOCUMENTS, DOCUMENTS.flip(0) * 7])),
    "everything": prefix(N),
    "nothing": prefix(0),
    "by-head": mask_mod(lambda b, h, q, kv: (kv <= q) & ((q - kv) % (h + 2) == 0)),
}
# how many ranks hold a sequence, and how: consecutive segments, or a plan
WAYS = [(2, "segments"), (4, "segments"), (4, "scan"), (4, "zigzag"), (4, "lpt")]


def sequence(n: int, *, grad: bool = True):
    return helpers.randn(2, 4, n, 8, grad=grad), *(
        helpers.randn(2, 2, n, d, seed=d, grad=grad) for d in (8, 4)
    )


def compiled(name: str, n: int = N, block_size=16):
    mask = MASKS[name]
    return compile_mask(mask, 2, 4, n, n, device="cpu", block_size=block_size)


def summed(gradients) -> list[torch.Tensor]:
    """Over the ranks: each has its share of the gradient of what all of them hold."""
    gradients = [g.clone(memory_format=torch.contiguous_format) for g in gradients]
    for g in gradients:
        dist.all_reduce(g)
    return gradients


def block_sparse_case(name: str, method: str) -> None:
    query, key, value = sequence(N)
    sinks = helpers.randn(4, seed=5, grad=True)
    bias = helpers.randn(4, 2 * N - 1, seed=6, grad=True)
    leaves = [query, key, value, sinks, bias]
    weights = helpers.randn(2, 4, N, 4, seed=8), helpers.randn(2, 4, N, seed=9)
    options = {"sinks": sinks, "bias": bias, "softcap": 5.0, "return_lse": True}
    mask = compiled(name, block_size=(32, 16) if method == "lpt" else 16)
    out, lse = block_sparse_attention(query, key, value, mask, **options)
    wanted = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), leaves)

    plan = balance(mask, dist.get_world_size(), method=method)
    mine = [shard(x, plan) for x in (query, key, value)]
    found, found_lse = context_parallel_block_sparse_attention(*mine, plan, **options)
    loss = (found * shard(weights[0], plan)).sum() + (found_lse * shard(weights[1], plan)).sum()
    gradients = summed(torch.autograd.grad(loss, leaves))
    helpers.assert_close(unshard(found, plan), out, 1e-5, "out")
    helpers.assert_close(unshard(found_lse, plan), lse, 1e-5, "lse")
    for leaf, actual, expected in zip("q k v sinks bias".split(), gradients, wanted, strict=True):
        helpers.assert_close(actual, expected, 5e-5, f"gradient of {leaf}")


@pytest.mark.parametrize(
    ("ranks", "name", "method"),
    [(2, name, "auto") for name in MASKS]
    + [(4, name, method) for name in MASKS for method in ("auto", "lpt")]
    + [(4, "causal", "zigzag"), (4, "causal", "cut"), (4, "documents", "cut")],
)
def test_block_sparse_equals_one_process(started, ranks, name, method):
    started(ranks).run(block_sparse_case, name, method)


def half_precision_case(dtype: torch.dtype) -> None:
    query, key, value = (x.detach().to(dtype) for x in sequence(N))
    plan = balance(compiled("causal"), dist.get_world_size())
    wanted = block_sparse_attention(query, key, value, plan.mask)
    mine = [shard(x, plan).requires_grad_() for x in (query, key, value)]
    out = context_parallel_block_sparse_attention(*mine, plan)
    out.sum().backward()
    helpers.assert_close(unshard(out, plan), wanted, 2e-2)
    assert all(x.grad.dtype == dtype for x in mine)


def test_half_precision_stays(started):
    started(2).run(half_precision_case, torch.bfloat16)


def repeated_case() -> None:
    mask = compiled("by-head")
    plan = balance(mask, dist.get_world_size(), method="lpt")
    results = []
    for _ in range(2):
        leaves = [shard(x, plan).requires_grad_() for x in sequence(N, grad=False)]
        out = context_parallel_block_sparse_attention(*leaves, plan, deterministic=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for first, second in zip(*results, strict=True):
        helpers.assert_identical(first, second)


def test_gradients_have_the_same_bits_in_every_run(started):
    started(4).run(repeated_case)


def traffic_case(name: str) -> None:
    """Traffic through the collectives equals the plan's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plan = balance(compiled(name), ranks)
    sent, exchange = [], dist.all_to_all_single

    def counting(output, source, received=None, counts=None, **options):
        row = source[0].numel() * source.element_size() if source.numel() else 0
        sent.append(sum(n for r, n in enumerate(counts) if r != rank) * row)
        return exchange(output, source, received, counts, **options)

    mine = [shard(x, plan).requires_grad_() for x in sequence(N, grad=False)]
    dist.all_to_all_single = counting
    try:
        context_parallel_block_sparse_attention(*mine, plan).sum().backward()
    finally:
        dist.all_to_all_single = exchange
    a_token = token_bytes(2, 8, 4, batch=2, dtype=torch.float32)
    assert sent == [plan.bytes_sent(rank, a_token), plan.bytes_received(rank, a_token)]
    assert plan.bytes_received(rank, a_token) <= plan.bytes_all_gather(rank, a_token)
    if name == "window":
        assert sent[0] <= 3 * 16 * a_token  # 40 keys back reach into three blocks
    if name == "nothing":
        assert sent == [0, 0]


@pytest.mark.parametrize("name", ["causal", "window", "documents", "nothing"])
def test_only_what_a_rank_sees_is_sent_to_it(processes, name):
    processes.run(traffic_case, name)


def few_tokens_case(n: int) -> None:
    """Fewer blocks than ranks: some hold nothing, and still take part."""
    leaves = sequence(n)
    out = block_sparse_attention(*leaves, causal())
    plan = balance(
        compile_mask(causal(), 2, 4, n, n, device="cpu", block_size=16), dist.get_world_size()
    )
    wanted = torch.autograd.grad(out.square().sum(), leaves)
    found = context_parallel_block_sparse_attention(*(shard(x, plan) for x in leaves), plan)
    gradients = summed(torch.autograd.grad(found.square().sum(), leaves))
    helpers.assert_close(unshard(found, plan), out, 1e-5)
    for actual, expected in zip(gradients, wanted, strict=True):
        helpers.assert_close(actual, expected, 5e-5)
    landmarks = helpers.randn(2, 5, 8, seed=3)
    wanted = nystrom_attention(*leaves, landmarks)
    mine = (shard(x, plan) for x in leaves)
    found = context_parallel_nystrom_attention(*mine, landmarks, plan=plan)
    found.sum().backward()
    helpers.assert_close(unshard(found, plan), wanted, 1e-5)
    by_token = helpers.randn(1, 1, n, 1, seed=4).sigmoid()
    rows = shard(by_token, plan)
    gates = [(x, x) for x in (torch.full((1, 1, 1, 1), 0.5), torch.tensor(0.5))]
    gates += [(by_token, rows), (by_token[0, 0], rows[0, 0])]
    for merge, gate, own in [("slots", None, None), ("mass", None, None)] + [
        ("gate", *pair) for pair in gates
    ]:
        options = {"window": 8, "merge": merge}
        wanted = hybrid_attention(*leaves, landmarks, gate=gate, **options)
        mine = (shard(x, plan) for x in leaves)
        found = context_parallel_hybrid_attention(*mine, landmarks, plan=plan, gate=own, **options)
        found.sum().backward()
        helpers.assert_close(unshard(found, plan), wanted, 1e-5)


@pytest.mark.parametrize("n", [1, 17, 33])
def test_fewer_blocks_than_ranks(started, n):
    started(4).run(few_tokens_case, n)


def nystrom_case(normalize: str, decays: bool, resumed: bool, method: str) -> None:
    exchange = "scan" if method == "scan" else "all-gather"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    query, key, value = sequence(N)
    landmarks = helpers.randn(2, 5, 8, seed=3, grad=True)
    options = {"normalize": normalize, "landmarks": landmarks}
    if normalize == "mass":
        options["core"] = (torch.eye(5) + 0.1).expand(2, 5, 5).clone().requires_grad_()
    if decays:
        options["decay"] = (0.1 * helpers.randn(2, 5, seed=4).abs()).requires_grad_()
    if resumed:
        L, R = (helpers.randn(2, 2, 5, *d, seed=11, grad=True) for d in ((), (4,)))
        options["state"] = NystromState(L, R)
    leaves = [x for x in torch.utils._pytree.tree_leaves(options) if isinstance(x, torch.Tensor)]
    leaves = [query, key, value, *leaves]
    key_mask = helpers.randn(2, N, seed=12) > -0.5
    weights = helpers.randn(2, 4, N, 4, seed=8)
    out, state = nystrom_attention(
        query, key, value, key_mask=key_mask, return_state=True, **options
    )
    loss = (out * weights).sum()
    if exchange == "all-gather":
        loss = loss + state.L.sum() + state.R.sum()
    wanted = torch.autograd.grad(loss, leaves)

    if method in ("segments", "scan"):  # consecutive segments of any lengths
        plan, bounds = None, [0, 90, 91, 150, N] if ranks == 4 else [0, 90, N]
        here = slice(bounds[rank], bounds[rank + 1])
        parts = [x[:, :, here] for x in (query, key, value, weights, key_mask[:, None])]
        expected = out[:, :, here]
    else:
        plan = balance(compiled("causal"), ranks, method=method)
        parts = [shard(x, plan) for x in (query, key, value, weights, key_mask[:, None])]
        expected = shard(out, plan)
    found = context_parallel_nystrom_attention(
        *parts[:3], key_mask=parts[4][:, 0], plan=plan, exchange=exchange,
        return_state=exchange == "all-gather", **options,
    )  # fmt: skip
    if exchange == "all-gather":
        found, ends = found
        helpers.assert_close(ends.L, state.L, 1e-5, "L")
        helpers.assert_close(ends.R, state.R, 1e-5, "R")
    loss = (found * parts[3]).sum()
    if exchange == "all-gather" and rank == 0:
        loss = loss + ends.L.sum() + ends.R.sum()
    gradients = summed(torch.autograd.grad(loss, leaves))
    helpers.assert_close(found, expected, 1e-5, "out")
    for number, (actual, expected) in enumerate(zip(gradients, wanted, strict=True)):
        helpers.assert_close(actual, expected, 5e-5, f"gradient {number}")


@pytest.mark.parametrize(("ranks", "method"), WAYS)
@pytest.mark.parametrize(
    ("normalize", "decays", "resumed"),
    [("landmark", False, False), ("landmark", True, True), ("mass", True, False)],
    ids=["landmark", "landmark-decay-state", "mass-decay"],
)
def test_nystrom_equals_one_process(started, ranks, method, normalize, decays, resumed):
    started(ranks).run(nystrom_case, normalize, decays, resumed, method)


def errors_case() -> None:
    plan = balance(compiled("causal"), dist.get_world_size())
    query, key, value = (shard(x, plan) for x in sequence(N, grad=False))
    attend = context_parallel_block_sparse_attention
    with pytest.raises(ValueError, match="query: expected the .* tokens of rank"):
        attend(query[:, :, 1:], key, value, plan)
    with pytest.raises(ValueError, match="plan: expected one for the 2 ranks"):
        attend(query, key, value, balance(compiled("causal"), 3))
    with pytest.raises(TypeError, match="plan: expected a ContextPlan"):
        attend(query, key, value, plan.mask)
    with pytest.raises(ValueError, match="bias: expected a relative one"):
        attend(query, key, value, plan, bias=torch.zeros(4, 5))
    attend, landmarks = context_parallel_nystrom_attention, torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="exchange: expected 'all-gather' where a rank holds"):
        attend(query, key, value, landmarks, plan=plan, exchange="scan")
    with pytest.raises(ValueError, match="exchange: expected 'all-gather' or 'scan'"):
        attend(query, key, value, landmarks, exchange="ring")


def test_errors_name_the_argument(started):
    started(2).run(errors_case)


def hybrid_case(merge: str, method: str, masked: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    query, key, value = sequence(N)
    landmarks = helpers.randn(2, 5, 8, seed=3, grad=True)
    leaves = [query, key, value, landmarks]
    weights = helpers.randn(2, 4, N, 4, seed=8)
    gate = helpers.randn(2, 4, N, 1, seed=9).sigmoid().requires_grad_()
    key_mask = helpers.randn(2, N, seed=12) > -0.5
    options = {"window": 8, "merge": merge}
    exchange = "scan" if method == "scan" else "all-gather"
    if merge == "gate":
        leaves.append(gate)
    out = hybrid_attention(
        query, key, value, landmarks, gate=gate if merge == "gate" else None,
        key_mask=key_mask if masked else None, **options,
    )  # fmt: skip
    wanted = torch.autograd.grad((out * weights).sum(), leaves)
    if method in ("segments", "scan"):
        plan, bounds = None, [0, 88, 96, 152, N] if ranks == 4 else [0, 88, N]

        def mine(x):
            return x[:, :, bounds[rank] : bounds[rank + 1]]

    else:
        plan = balance(compiled("causal"), ranks, method=method)

        def mine(x):
            return shard(x, plan)

    found = context_parallel_hybrid_attention(
        *(mine(x) for x in (query, key, value)), landmarks, plan=plan, exchange=exchange,
        gate=mine(gate) if merge == "gate" else None,
        key_mask=mine(key_mask[:, None])[:, 0] if masked else None, **options,
    )  # fmt: skip
    gradients = summed(torch.autograd.grad((found * mine(weights)).sum(), leaves))
    helpers.assert_close(found, mine(out), 1e-5, "out")
    for number, (actual, expected) in enumerate(zip(gradients, wanted, strict=True)):
        helpers.assert_close(actual, expected, 5e-5, f"gradient {number}")


@pytest.mark.parametrize(("ranks", "method"), WAYS)
@pytest.mark.parametrize(("merge", "masked"), [("slots", True), ("mass", False), ("gate", True)])
def test_hybrid_equals_one_process(started, ranks, method, merge, masked):
    started(ranks).run(hybrid_case, merge, method, masked)


def hybrid_errors_case() -> None:
    query, key, value = (x[:, :, :21] for x in sequence(N, grad=False))
    with pytest.raises(ValueError, match="window: expected every segment but the last"):
        context_parallel_hybrid_attention(query, key, value, torch.zeros(2, 5, 8), window=8)


def test_segments_of_a_hybrid_are_whole_windows(started):
    started(2).run(hybrid_errors_case)
