"""The dense definition of hybrid attention: what it promises, and its limits by formula."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from flashmark import landmark_core, masks, reference
from flashmark.reference import hybrid_attention
from tests import helpers

MERGES = ("slots", "mass", "gate")
F64 = torch.float64


def inputs(n=23, *, batch=2, marks=5, v_dim=3, merge="slots", grad=False, spread=0.5):
    query, key, value = helpers.qkv(batch, 4, n, 6, kv_heads=2, v_dim=v_dim, dtype=F64, grad=False)
    # far from ill-conditioned, and a kernel close enough to the true one that its mass is positive
    arguments = {
        "query": query * spread,
        "key": key,
        "value": value,
        "landmarks": helpers.randn(2, marks, 6, dtype=F64, seed=5),
    }
    if merge == "gate":
        arguments["gate"] = torch.sigmoid(helpers.randn(batch, 4, n, 1, dtype=F64, seed=6))
    if grad:
        arguments = {name: x.requires_grad_() for name, x in arguments.items()}
    return arguments


@pytest.fixture(params=MERGES)
def merge(request):
    return request.param


@pytest.fixture
def op(merge):
    return functools.partial(hybrid_attention, window=4, merge=merge)


def by_loops(query, key, value, landmarks, core, gate, merge, window, scale):
    """One head, one sample, numbers and sums: (N, D), (N, D), (N, Dv), (M, D)."""

    def dot(a, b):
        return scale * sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))

    marks, rows = range(len(landmarks)), []
    for i in range(len(query)):
        seen = range(i + 1)
        near = [j for j in seen if i // window - j // window <= 1]
        far = [j for j in seen if i // window - j // window >= 2]
        near_weights = [math.exp(dot(query[i], key[j])) for j in near]
        near_sum = sum(w * value[j] for w, j in zip(near_weights, near, strict=True))
        numerator, mass = near_sum, sum(near_weights)
        if merge == "slots":
            n = [0.0 for _ in marks]
            key_sum, value_sum = ([0.0 for _ in marks] for _ in range(2))
            for j in far:
                routes = [math.exp(dot(landmarks[m], key[j])) for m in marks]
                for m in marks:
                    a = routes[m] / sum(routes)
                    n[m] += a
                    key_sum[m] = key_sum[m] + a * key[j]
                    value_sum[m] = value_sum[m] + a * value[j]
            for m in marks if far else ():
                weight = n[m] * math.exp(dot(query[i], key_sum[m] / n[m]))
                numerator = numerator + weight * value_sum[m] / n[m]
                mass += weight
        elif merge == "mass":
            half = [0.5 * dot(x, x) for x in landmarks]
            reading = [math.exp(dot(query[i], landmarks[m]) - half[m]) for m in marks]
            G = [sum(reading[n] * core[n][m].item() for n in marks) for m in marks]
            for m, j in itertools.product(marks, far):
                weight = G[m] * math.exp(dot(landmarks[m], key[j]) - half[m])
                numerator, mass = numerator + weight * value[j], mass + weight
        elif far:
            reading = [math.exp(dot(query[i], x)) for x in landmarks]
            F = [x / sum(reading) for x in reading]
            rest = 0.0
            for m in marks:
                weights = [math.exp(dot(landmarks[m], key[j])) for j in far]
                R = sum(w * value[j] for w, j in zip(weights, far, strict=True)) / sum(weights)
                rest = rest + sum(F[n] * core[n][m].item() for n in marks) * R
            g = gate[i].item()
            numerator, mass = g * near_sum / mass + (1 - g) * rest, 1.0
        rows.append(numerator / mass)
    return torch.stack(rows)


def test_against_loops(op, merge):
    arguments = inputs(merge=merge)
    kind = "kernel" if merge == "mass" else "softmax"
    core = landmark_core(arguments["landmarks"], scale=0.3, kind=kind)
    out = op(**arguments, scale=0.3)
    for b, h in itertools.product(range(2), range(4)):
        gate = arguments["gate"][b, h] if merge == "gate" else None
        query, key, value = (
            arguments[x][b, h if x == "query" else h // 2] for x in ("query", "key", "value")
        )
        landmarks = arguments["landmarks"][h // 2]
        wanted = by_loops(
            query, key, value, landmarks, core[h // 2], gate, merge, window=4, scale=0.3
        )
        helpers.assert_close(out[b, h], wanted, 1e-12)


def test_a_window_over_everything_is_exact_attention(op, merge):
    arguments = inputs(n=8, merge=merge)
    exact = reference.block_sparse_attention(
        arguments["query"], arguments["key"], arguments["value"], masks.causal()
    )
    helpers.assert_close(op(**arguments), exact, 1e-13)


def test_mass_is_exact_when_the_landmarks_are_the_far_keys():
    arguments = inputs(n=12, batch=1)
    far = arguments["key"][0, :, :4]  # of chunk 2, at window 4
    exact = reference.block_sparse_attention(
        *(arguments[x] for x in ("query", "key", "value")), masks.causal()
    )
    core = landmark_core(far, kind="kernel", jitter=1e-13)
    out = hybrid_attention(**arguments | {"landmarks": far}, window=4, merge="mass", core=core)
    helpers.assert_close(out, exact, 1e-9)


def test_slots_are_exact_when_each_holds_one_key():
    arguments = inputs(n=12, batch=1)
    arguments["key"] = 10 * torch.eye(12, 6, dtype=F64).expand(1, 2, 12, 6).contiguous()
    arguments["key"][:, :, 4:] = inputs(n=12, batch=1)["key"][:, :, 4:]
    landmarks = 10 * torch.eye(4, 6, dtype=F64).expand(2, 4, 6)  # one for each of keys 0 to 3
    exact = reference.block_sparse_attention(
        *(arguments[x] for x in ("query", "key", "value")), masks.causal()
    )
    out = hybrid_attention(**arguments | {"landmarks": landmarks}, window=4)
    helpers.assert_close(out, exact, 1e-12)


def test_a_constant_value_comes_back(op, merge):
    arguments = inputs(merge=merge)
    arguments["value"] = torch.ones_like(arguments["value"]) * torch.tensor([3.0, -1.0, 0.5])
    out = op(**arguments)
    helpers.assert_close(out, arguments["value"][:, :1].expand_as(out), 1e-12)


def test_slots_stay_between_the_least_and_the_largest_value_so_far():
    arguments = inputs(n=40, spread=3.0)
    out = hybrid_attention(**arguments, window=3)
    value = arguments["value"].repeat_interleave(2, dim=1)
    assert (out <= value.cummax(2).values + 1e-12).all()
    assert (out >= value.cummin(2).values - 1e-12).all()


def test_no_key_is_counted_twice_and_none_is_forgotten():
    """All scores zero: every visible key weighs the same, near or far."""
    arguments = inputs(n=30)
    arguments["query"] = torch.zeros_like(arguments["query"])
    out = hybrid_attention(**arguments, window=4)
    value = arguments["value"].repeat_interleave(2, dim=1)
    means = value.cumsum(2) / torch.arange(1, 31).view(-1, 1)
    helpers.assert_close(out, means, 1e-12)


def test_gradients_to_the_future_are_exactly_zero(op, merge):
    for i in (0, 3, 8, 15):
        arguments = inputs(merge=merge, grad=True)
        op(**arguments)[:, :, i].sum().backward()
        for x in ("query", "key", "value"):
            grad = arguments[x].grad
            assert not grad[:, :, i + 1 :].any(), f"{x} after {i}"
            assert grad[:, :, : i + 1].any() or i == 0
        if merge == "slots" or i < 8:
            far = arguments["landmarks"].grad
            assert (far is not None and far.any()) == (i >= 8)


def test_gradients_by_finite_differences(op, merge):
    arguments = inputs(n=10, batch=1, marks=3, merge=merge, grad=True)
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[:, 1] = False
    names, leaves = zip(*arguments.items(), strict=True)
    call = functools.partial(op, window=2, key_mask=mask)
    assert torch.autograd.gradcheck(
        lambda *x: call(**dict(zip(names, x, strict=True))), leaves, fast_mode=True
    )


@pytest.mark.parametrize("cuts", [(1,), (8,), (5, 6, 17), tuple(range(1, 23))], ids=str)
def test_splitting_with_a_state_changes_nothing(op, merge, cuts):
    arguments = inputs(merge=merge)
    landmarks = arguments.pop("landmarks")
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 4:7] = False
    whole = op(**arguments, landmarks=landmarks, key_mask=mask)
    parts, state = [], None
    for start, stop in itertools.pairwise((0, *cuts, 23)):
        part = {name: x[:, :, start:stop] for name, x in arguments.items()}
        out, state = op(
            **part, landmarks=landmarks, key_mask=mask[:, start:stop], state=state,
            return_state=True,
        )  # fmt: skip
        parts.append(out)
    helpers.assert_close(torch.cat(parts, dim=2), whole, 1e-13)


def test_packed_sequences_are_sequences_of_their_own(op, merge):
    arguments = inputs(batch=1, merge=merge)
    bounds = [0, 1, 1, 13, 23]
    packed, states = op(
        **arguments, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), return_state=True
    )
    landmarks = arguments.pop("landmarks")
    for s, (start, stop) in enumerate(itertools.pairwise(bounds)):
        own = {name: x[:, :, start:stop] for name, x in arguments.items()}
        helpers.assert_close(op(**own, landmarks=landmarks), packed[:, :, start:stop], 1e-13)
        assert states[s][0].shape[1] == stop - start
    # and each goes on from its own place
    token = inputs(n=1, batch=4, merge=merge)
    later = op(**token, state=states)
    own = {
        name: torch.cat([arguments[name][:, :, 1:13], token[name][2:3]], dim=2)
        for name in arguments
    }
    alone = op(**own, landmarks=token["landmarks"])[:, :, -1:]
    helpers.assert_close(later[2:3], alone, 1e-13)


def test_rows_without_a_key_are_zero_and_have_no_gradient(op, merge):
    arguments = inputs(merge=merge, grad=True)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, :] = False
    out = op(**arguments, key_mask=mask)
    assert not out[0, :, :20].any() and not out[1].any() and out[0, :, 20:].any()
    out.sum().backward()
    for x in ("query", "key", "value"):
        grad = arguments[x].grad
        assert grad.isfinite().all()
        assert not grad[0, :, :20].any() and not grad[1].any()


def test_masked_keys_and_values_may_hold_anything(op, merge):
    arguments = inputs(merge=merge)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 2], mask[1, 9:15] = False, False
    clean = op(**arguments, key_mask=mask)
    for x in ("key", "value"):
        arguments[x] = arguments[x].masked_fill(~mask[:, None, :, None], torch.nan)
    helpers.assert_identical(op(**arguments, key_mask=mask), clean)


def test_a_far_mass_that_comes_out_negative_is_dropped_with_its_numerator():
    arguments = inputs(n=12, batch=1, grad=True)
    core = -torch.eye(5, dtype=F64).expand(2, 5, 5)
    out = hybrid_attention(**arguments, window=2, merge="mass", core=core)
    near = masks.causal() & masks.mask_mod(lambda b, h, i, j: i // 2 - j // 2 <= 1)
    exact = reference.block_sparse_attention(
        *(arguments[x] for x in ("query", "key", "value")), near
    )
    helpers.assert_close(out, exact, 1e-13)
    out.sum().backward()
    assert not arguments["landmarks"].grad.any()


def test_a_gate_of_one_is_the_near_field_and_of_zero_nystrom_far_away():
    arguments = inputs(n=12)
    near = masks.causal() & masks.mask_mod(lambda b, h, i, j: i // 2 - j // 2 <= 1)
    exact = reference.block_sparse_attention(
        *(arguments[x] for x in ("query", "key", "value")), near
    )
    gate = torch.ones(1, 4, 1, 1, dtype=F64)
    op = functools.partial(hybrid_attention, window=2, merge="gate")
    helpers.assert_close(op(**arguments, gate=gate), exact, 1e-13)
    out = op(**arguments, gate=torch.zeros_like(gate))
    helpers.assert_close(out[:, :, :4], exact[:, :, :4], 1e-13)
    past = {x: arguments[x][:, :, :8] for x in ("key", "value")}  # what rows 10 and 11 see
    far = reference.nystrom_attention(
        arguments["query"][:, :, 10:], **past, landmarks=arguments["landmarks"], is_causal=False
    )
    helpers.assert_close(out[:, :, 10:], far, 1e-12)


def test_landmarks_may_be_a_pair_or_one_set_a_sample(op, merge):
    arguments = inputs(merge=merge)
    plain = op(**arguments)
    landmarks = arguments.pop("landmarks")
    each = landmarks.expand(2, *landmarks.shape)
    helpers.assert_close(op(**arguments, landmarks=each), plain, 1e-13)
    if merge != "mass":
        other = (landmarks, helpers.randn(*landmarks.shape, dtype=F64, seed=9))
        differs = op(**arguments, landmarks=other)
        # slots route keys by the landmark queries alone
        assert torch.equal(differs, plain) == (merge == "slots")


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_and_one_token(op, merge, n, batch):
    arguments = {
        name: x[:batch, :, :n] if x.dim() == 4 else x
        for name, x in inputs(n=2, merge=merge).items()
    }
    out = op(**arguments)
    assert out.shape == (batch, 4, n, 3)
    wanted = arguments["value"].repeat_interleave(2, dim=1)  # the one key's value
    helpers.assert_close(out, wanted, 1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes(op, merge, dtype):
    arguments = inputs(merge=merge)
    exact = op(**arguments)
    out = op(**{name: x.to(dtype) for name, x in arguments.items()})
    assert out.dtype == dtype
    helpers.assert_close(out, exact, 100 * torch.finfo(dtype).eps)


def test_huge_scores_stay_finite(op, merge):
    arguments = inputs(merge=merge, grad=True, spread=100.0)
    arguments = {name: x.float().detach().requires_grad_() for name, x in arguments.items()}
    out = op(**arguments)
    out.square().sum().backward()
    for x in (out, *(leaf.grad for leaf in arguments.values())):
        assert x.isfinite().all()
