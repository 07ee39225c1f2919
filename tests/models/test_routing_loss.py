"""`routing_loss`: divergence of a router from the attention that it routes."""

from __future__ import annotations

import pytest
import torch

from flashmark import reference, routed_attention
from flashmark.objectives import routing_loss
from flashmark.routed import Routing, mass

SIZES = {"block_size": 4, "near": 1}


def inputs(tokens: int = 30, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key = drawn(2, 2 * kv_heads, tokens, 6), drawn(2, kv_heads, tokens, 6)
    return query, key, drawn(2, kv_heads, tokens, 5), drawn(kv_heads, 3, 6)


def loss_of(*tensors, **options):
    return routing_loss(routed_attention(*tensors, **SIZES, return_routing=True, **options)[1])


def dense(query, key, value, landmarks, top_k: int):
    """The loss, row by row, from dense softmax and the reference's scores."""
    batch, heads, tokens, dim = query.shape
    kv_heads, size = key.shape[1], SIZES["block_size"]
    scores = reference.block_scores(query, key, landmarks, **SIZES)
    means, logs, _ = reference.routed.block_summaries(key, landmarks, block_size=size)
    grouped = query.unflatten(1, (kv_heads, -1))
    each = torch.einsum("bhgid,bhcmd->bhgicm", grouped, means) / dim**0.5 + logs[:, :, None, None]
    each = each.logsumexp(5)  # (B, Hkv, G, N, blocks)
    logits = query @ key.repeat_interleave(heads // kv_heads, 1).mT / dim**0.5
    chosen = torch.full((batch, kv_heads, tokens, top_k), -1)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in chosen.shape[:3])).tolist():
        row = scores[tuple(index)]
        order = row.argsort(descending=True, stable=True)[:top_k]
        order = order[row[order] > float("-inf")]
        chosen[tuple(index)][: len(order)] = order
    own = torch.arange(tokens) // size
    block = torch.arange(tokens) // size
    terms = []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in chosen.shape[:3])).tolist():
        picked = [c for c in chosen[b, h, i].tolist() if c >= 0]
        if not picked:
            continue
        read = (block >= own[i] - SIZES["near"]) | torch.isin(block, torch.tensor(picked))
        read &= torch.arange(tokens) <= i
        group = slice(h * (heads // kv_heads), (h + 1) * (heads // kv_heads))
        row = logits[b, group, i].masked_fill(~read, float("-inf"))
        shares = torch.softmax(row, -1).mean(0)
        found = torch.stack([shares[block == c].sum() for c in picked]).detach()
        expected = (each[b, h, :, i, picked] - row.logsumexp(1).detach()[:, None]).logsumexp(0)
        guess = torch.log_softmax(expected, -1)
        target = found / found.sum()
        terms.append((target * (target.log() - guess)).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("products", ["of all keys", "of gathered keys"])
@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("marks", ["mean", "landmarks"])
def test_equals_the_dense_divergence(top_k, marks, products, monkeypatch):
    if products == "of gathered keys":
        monkeypatch.setattr(mass, "DENSE", 0)
    query, key, value, landmarks = inputs()
    landmarks = None if marks == "mean" else landmarks
    expected = dense(query, key, value, landmarks, top_k)
    actual = loss_of(query, key, value, landmarks, top_k=top_k)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (top_k == 1) == (actual.item() == 0.0)  # of one block there is nothing to guess


def test_gradient_of_landmarks():
    query, key, value, landmarks = inputs(kv_heads=1)
    landmarks.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_of(query, key, value, x, top_k=3), (landmarks,), atol=1e-7
    )


def test_gradient_of_scores():
    query, key, value, _ = inputs(kv_heads=1)
    scores = torch.randn(2, 1, 30, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: loss_of(query, key, value, scores=x, top_k=3), (scores,), atol=1e-7
    )


def test_inputs_of_the_attention_are_constants():
    tensors = [x.requires_grad_() for x in inputs()]
    loss = loss_of(*tensors, top_k=3)
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert [x is None for x in found] == [True, True, True, False]
    assert found[3].abs().sum() > 0


def test_learning_lowers_the_divergence_of_landmarks():
    query, key, value, landmarks = inputs(tokens=60)
    landmarks.requires_grad_()
    optimizer = torch.optim.Adam([landmarks], lr=0.05)
    losses = []
    for _ in range(20):
        loss = loss_of(3 * query, key, value, landmarks, top_k=20)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "tokens, top_k", [(6, 2), (30, 0), (0, 2)], ids=["near only", "top_k 0", "no tokens"]
)
def test_is_zero_where_nothing_is_chosen(tokens, top_k):
    query, key, value, landmarks = inputs(tokens)
    landmarks.requires_grad_()
    loss = loss_of(query, key, value, landmarks, top_k=top_k)
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, landmarks, allow_unused=True, materialize_grads=True)
    assert not gradient.any()


def test_rows_without_mass_are_left_out():
    one, none = torch.tensor([0.2, 0.6]), torch.zeros(2)
    guess = torch.log_softmax(torch.tensor([0.1, 0.7]), -1)

    def routing(*mass):
        mass = torch.stack(mass)[None, None]
        return Routing(torch.zeros(mass.shape).int(), mass, guess.expand(mass.shape))

    torch.testing.assert_close(routing_loss(routing(one, none)), routing_loss(routing(one)))
    assert routing_loss(routing(none)).item() == 0.0


def test_what_is_no_routing_is_refused():
    with pytest.raises(TypeError, match="routing: expected a Routing, got Tensor"):
        routing_loss(torch.zeros(3))
