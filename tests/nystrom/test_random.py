"""Any combination of features, drawn at random, against the float64 reference."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmark
from flashmark.nystrom import nystrom_attention
from tests.nystrom.cases import BACKENDS, PACKED, Case


@st.composite
def cases(draw) -> Case:
    packed = draw(st.integers(0, 4)) == 0
    is_causal = draw(st.integers(0, 3)) > 0
    n = PACKED if packed else draw(st.integers(1, 140))
    kv_len = n if is_causal or packed else draw(st.integers(1, 140))
    normalize = draw(st.sampled_from(["landmark", "landmark", "mass"]))
    left = draw(st.integers(0, kv_len))
    return Case(
        n,
        draw(st.sampled_from([1, 2, 5, 8, 16, 70])) if not packed else draw(st.integers(1, 5)),
        group=draw(st.sampled_from([1, 1, 2, 3])),
        batch=1 if packed else draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from([1, 3, 8, 16])),
        v_dim=draw(st.sampled_from([1, 2, 8, 17])),
        landmarks=draw(st.sampled_from(["tied", "pair", "batched"])),
        given_core=True,  # random landmarks may be as ill-conditioned as they like
        decay=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) if is_causal else 0.0,
        normalize=normalize,
        padding=draw(st.none() | st.just((left, draw(st.integers(0, kv_len - left))))),
        packed=packed,
        state=draw(st.booleans()),
        is_causal=is_causal,
        kv_len=kv_len,
        spread=draw(st.sampled_from([1.0, 1.0, 1.0, 30.0, 1000.0])),
        layout=draw(st.sampled_from(["contiguous", "bnhd", "gaps"])),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_combination(backend):
    op = functools.wraps(nystrom_attention)(functools.partial(nystrom_attention, backend=backend))

    @settings(max_examples=120)
    @given(cases())
    def run(case):
        report = flashmark.check(op, **case.arguments(), return_state=True)
        for row in report.rows:  # a parameter's gradient may cancel: half a digit of room
            assert row.error <= 5 * row.budget, f"{row.name} of {case}\n{report}"

    run()
