"""Wrong arguments to masks: one sentence, argument, expected, got."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashmark
from flashmark import masks

BOOL = torch.ones(8, 8, dtype=torch.bool)


def later(b, h, q, kv):
    return q >= kv


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and len(str(error)) < 300


CONSTRUCTORS = {
    "negative-window": (lambda: masks.sliding_window(-2), ValueError, "left.*-2"),
    "zero-window": (lambda: masks.sliding_window(0), ValueError, "left.*0"),
    "negative-right": (lambda: masks.sliding_window(3, -2), ValueError, "right.*-2"),
    "float-window": (lambda: masks.sliding_window(1.5), TypeError, "left.*float"),
    "stride-zero": (lambda: masks.dilated(0), ValueError, "stride.*0"),
    "stride-bool": (lambda: masks.dilated(True), TypeError, "stride.*bool"),
    "negative-prefix": (lambda: masks.prefix(-3), ValueError, "n.*-3"),
    "prefix-float": (lambda: masks.prefix(torch.tensor([1.0])), TypeError, "n.*float"),
    "prefix-2d": (
        lambda: masks.prefix(torch.ones(2, 2, dtype=torch.long)),
        ValueError,
        r"n.*\(2, 2\)",
    ),
    "pinned-string": (lambda: masks.pinned("4"), TypeError, "n.*str"),
    "ids-list": (lambda: masks.documents([0, 1]), TypeError, "ids.*list"),
    "ids-float": (lambda: masks.documents(torch.zeros(4)), TypeError, "ids.*float"),
    "ids-3d": (
        lambda: masks.documents(torch.zeros(1, 1, 4, dtype=torch.long)),
        ValueError,
        r"ids.*\(1, 1, 4\)",
    ),
    "lengths-float": (lambda: masks.key_padding(torch.tensor([1.5])), TypeError, "lengths.*float"),
    "lengths-int": (lambda: masks.key_padding(5), TypeError, "lengths.*int"),
    "lengths-bool-1d": (lambda: masks.key_padding(BOOL[0]), ValueError, r"lengths.*\(8,\)"),
    "map-int": (lambda: masks.blocks(BOOL.long(), 32), TypeError, "map.*int64"),
    "map-1d": (lambda: masks.blocks(BOOL[0], 32), ValueError, r"map.*\(8,\)"),
    "map-block-size": (lambda: masks.blocks(BOOL, 0), ValueError, "block_size.*0"),
    "max-blocks": (lambda: masks.blocks(BOOL, 32, max_blocks=0), ValueError, "max_blocks.*0"),
    "dense-float": (lambda: masks.dense(torch.ones(4, 4)), TypeError, "bool.*float"),
    "dense-5d": (lambda: masks.dense(BOOL.view(1, 1, 1, 8, 8)), ValueError, r"\(1, 1, 1, 8, 8\)"),
    "key-ids-float": (
        lambda: masks.documents(torch.zeros(4).long(), torch.zeros(4)),
        TypeError,
        "key_ids.*float",
    ),
    "cumulative-float": (lambda: masks.packed(torch.zeros(3)), TypeError, "cu_seqlens_q.*float"),
    "cumulative-2d": (
        lambda: masks.packed(torch.zeros(1, 3).long()),
        ValueError,
        r"cu_seqlens_q.*\(1, 3\)",
    ),
    "other-number-of-sequences": (
        lambda: masks.packed(torch.tensor([0, 4, 8]), torch.tensor([0, 8])),
        ValueError,
        "cu_seqlens_k.*3.*2",
    ),
    "packed-function": (
        lambda: masks.packed(
            torch.tensor([0, 8]), mask=masks.mask_mod(lambda b, h, q, kv: q >= kv)
        ),
        ValueError,
        "mask.*positions",
    ),
    "mod-not-callable": (lambda: masks.mask_mod(3), TypeError, "fn.*int"),
}


@pytest.mark.parametrize(
    ("build", "error", "match"), CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys()
)
def test_constructors(build, error, match):
    with pytest.raises(error, match=match) as caught:
        build()
    assert type(caught.value) is error and one_sentence(caught.value)


@pytest.mark.parametrize(
    "combine", [lambda m: m & True, lambda m: m | torch.ones(2, 2), lambda m: 1 & m]
)
def test_masks_combine_with_masks_only(combine):
    with pytest.raises(TypeError):
        combine(masks.causal())


def test_and_or_not_of_python_are_refused():
    with pytest.raises(TypeError, match="&"):
        bool(masks.causal())


def flex_mask():
    return create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 64, 64, device="cpu")


NO_MASKS = {
    "a-tensor": (lambda: BOOL, "masks.dense"),
    "a-function": (lambda: lambda b, h, q, kv: q >= kv, "masks.mask_mod"),
    "a-flex-mask": (flex_mask, "masks.from_flex"),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_what_is_no_mask_is_told_how_to_become_one(name):
    make, hint = NO_MASKS[name]
    x = torch.zeros(1, 1, 64, 8)
    for call in (
        lambda: flashmark.block_sparse_attention(x, x, x, make()),
        lambda: flashmark.block_sparse_attention(x, x, x, make(), query_offset=0),
        lambda: masks.causal() & make(),
        lambda: make() | masks.causal(),
        lambda: masks.packed(torch.tensor([0, 64]), mask=make()),
    ):
        with pytest.raises(TypeError, match=f"mask: expected .*{hint}") as caught:
            call()
        assert one_sentence(caught.value)


def compile_with(mask, batch=2, heads=2, q_len=64, kv_len=64, device="cpu", block_size=32):
    return masks.compile_mask(
        mask, batch, heads, q_len, kv_len, device=device, block_size=block_size
    )


COMPILES = {
    "block-size-17": (
        lambda: compile_with(masks.causal(), block_size=17),
        ValueError,
        "block_size.*17",
    ),
    "block-size-0": (
        lambda: compile_with(masks.causal(), block_size=0),
        ValueError,
        "block_size.*0",
    ),
    "block-size-256": (
        lambda: compile_with(masks.causal(), block_size=(16, 256)),
        ValueError,
        "block_size.*256",
    ),
    "block-size-triple": (
        lambda: compile_with(masks.causal(), block_size=(16, 16, 16)),
        ValueError,
        "block_size",
    ),
    "a-tensor": (lambda: compile_with(BOOL), TypeError, "mask.*bool tensor.*masks.dense"),
    "a-function": (
        lambda: compile_with(lambda b, h, q, kv: q >= kv),
        TypeError,
        "mask.*function.*masks.mask_mod",
    ),
    "a-flex-mask": (lambda: compile_with(flex_mask()), TypeError, "FlexAttention.*from_flex"),
    "no-mask": (lambda: compile_with("causal"), TypeError, "mask.*str"),
    "negative-length": (lambda: compile_with(masks.causal(), q_len=-1), ValueError, "q_len.*-1"),
    "zero-batch-type": (lambda: compile_with(masks.causal(), batch=2.0), TypeError, "batch.*float"),
    "ids-length": (
        lambda: compile_with(masks.documents(torch.zeros(63, dtype=torch.long))),
        ValueError,
        "ids.*64.*63",
    ),
    "ids-batch": (
        lambda: compile_with(masks.documents(torch.zeros(3, 64, dtype=torch.long))),
        ValueError,
        "ids.*2.*3",
    ),
    "prefix-batch": (
        lambda: compile_with(masks.prefix(torch.tensor([1, 2, 3]))),
        ValueError,
        "prefix.*2.*3",
    ),
    "padding-batch": (
        lambda: compile_with(masks.key_padding(torch.tensor([1, 2, 3]))),
        ValueError,
        "2.*3",
    ),
    "padding-length": (
        lambda: compile_with(masks.key_padding(torch.ones(2, 60, dtype=torch.bool))),
        ValueError,
        "64.*60",
    ),
    "query-ids-length": (
        lambda: compile_with(masks.documents(torch.zeros(63).long(), torch.zeros(64).long())),
        ValueError,
        "^ids.*query, 64.*63",
    ),
    "key-ids-length": (
        lambda: compile_with(masks.documents(torch.zeros(64).long(), torch.zeros(63).long())),
        ValueError,
        "^key_ids.*key, 64.*63",
    ),
    "cumulative-too-far": (
        lambda: compile_with(masks.packed(torch.tensor([0, 65]))),
        ValueError,
        "cu_seqlens_q.*64.*65",
    ),
    "cumulative-falling": (
        lambda: compile_with(masks.packed(torch.tensor([0, 40, 30, 64]))),
        ValueError,
        "cu_seqlens_q.*ascending",
    ),
    "cumulative-not-from-0": (
        lambda: compile_with(masks.packed(torch.tensor([0, 64]), torch.tensor([2, 64]))),
        ValueError,
        "cu_seqlens_k.*from 0",
    ),
    "dense-shape": (lambda: compile_with(masks.dense(BOOL)), ValueError, r"64.*8"),
    "dense-heads": (
        lambda: compile_with(masks.dense(torch.ones(3, 64, 64, dtype=torch.bool))),
        ValueError,
        "2.*3",
    ),
    "blocks-shape": (lambda: compile_with(masks.blocks(BOOL, 32)), ValueError, "map.*2.*8"),
    "blocks-finer": (
        lambda: compile_with(masks.blocks(torch.ones(4, 4, dtype=torch.bool), 16)),
        ValueError,
        "block_size.*32.*16|block_size.*16.*32",
    ),
    "mod-returns-int": (
        lambda: compile_with(masks.mask_mod(lambda b, h, q, kv: q - kv)),
        TypeError,
        "fn.*int64",
    ),
    "nested": (
        lambda: compile_with(masks.causal() & ~masks.documents(torch.zeros(63, dtype=torch.long))),
        ValueError,
        "ids",
    ),
}


@pytest.mark.parametrize(("build", "error", "match"), COMPILES.values(), ids=COMPILES.keys())
def test_compile(build, error, match):
    with pytest.raises(error, match=match) as caught:
        build()
    assert type(caught.value) is error and one_sentence(caught.value)


def test_messages_read_as_argument_expected_got():
    with pytest.raises(ValueError) as caught:
        masks.dilated(-4)
    assert re.fullmatch(r"stride: expected .+, got -4\.?", str(caught.value))


def test_bool_and_from_flex_refuse_other_objects():
    with pytest.raises(TypeError, match="expected"):
        masks.from_flex(masks.causal())
    with pytest.raises(TypeError, match="expected"):
        masks.to_flex(masks.causal())
