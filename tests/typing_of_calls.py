"""Types of calls for a type checker: `make lint` reads this file, nothing runs it."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

import flashmark
from flashmark import masks
from flashmark.integrations import flex, huggingface


def operators(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, keep: bool) -> None:
    mask = masks.causal() & masks.sliding_window(512)
    sparse = flashmark.block_sparse_attention
    assert_type(sparse(query, key, value), Tensor)
    assert_type(sparse(query, key, value, mask, softcap=3.0, dropout_p=0.1), Tensor)
    assert_type(sparse(query, key, value, mask, return_lse=True), tuple[Tensor, Tensor])
    assert_type(sparse(query, key, value, mask, return_lse=keep), Tensor | tuple[Tensor, Tensor])
    nystrom = flashmark.nystrom_attention
    assert_type(nystrom(query, key, value, landmarks, is_causal=False), Tensor)
    assert_type(nystrom(query, key, value, (landmarks, landmarks), backend="eager"), Tensor)
    out, state = nystrom(query, key, value, landmarks, return_state=True)
    assert_type(out, Tensor)
    assert_type(state, flashmark.NystromState)
    assert_type(state.merge(state, 4), flashmark.NystromState)
    hybrid = flashmark.hybrid_attention
    assert_type(hybrid(query, key, value, landmarks, window=64), Tensor)
    out, held = hybrid(query, key, value, landmarks, window=64, return_state=True)
    assert_type(held, flashmark.HybridState)
    assert_type(flashmark.scaled_dot_product_attention(query, key, value), Tensor)


def wrong(query: Tensor, landmarks: Tensor) -> None:
    """Mistakes that are found: a comment that is not needed is an error."""
    flashmark.block_sparse_attention(query, query, query, soft_cap=3.0)  # type: ignore[call-overload]
    flashmark.block_sparse_attention(query, query, query, "causal")  # type: ignore[call-overload]
    flashmark.nystrom_attention(query, query, query)  # type: ignore[call-overload]
    flashmark.hybrid_attention(query, query, query, landmarks)  # type: ignore[call-overload]
    masks.sliding_window("512")  # type: ignore[arg-type]


def masks_and_landmarks(visible: Tensor) -> None:
    expression = ~masks.dense(visible) | masks.prefix(4)
    assert_type(expression, masks.Mask)
    mask = flashmark.compile_mask(expression, 1, 8, 512, 512, device="cpu", block_size=(64, 128))
    assert_type(mask, flashmark.BlockMask)
    assert_type(mask.density, float)
    assert_type(masks.from_flex(masks.to_flex(mask)), flashmark.BlockMask)
    marks = flashmark.init_landmarks(8, 64, 128, dtype=torch.bfloat16)
    assert_type(marks, Tensor)
    assert_type(flashmark.landmark_core(marks), Tensor)


def integrations(model: nn.Module, x: Tensor) -> None:
    huggingface.register()
    assert_type(huggingface.to_nystrom(model, landmarks=64, layers=range(3)), nn.Module)
    found = flex.flex_attention(x, x, x, return_aux=AuxRequest(lse=True))
    assert_type(found, Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput])
