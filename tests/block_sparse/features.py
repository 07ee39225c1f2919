"""Option sets of block_sparse_attention, each for query (1, 2, 40, D) and key (1, 2, 50, D)."""

from __future__ import annotations

import torch

from flashmark import masks
from tests import helpers


def block_mask(mask, q_len, kv_len=None, *, batch=1, heads=2, block_size=32):
    return masks.compile_mask(
        mask, batch, heads, q_len, kv_len or q_len, device="cpu", block_size=block_size
    )


WINDOW = masks.causal() & masks.sliding_window(20)
FEATURES = {
    "plain": lambda dtype: {},
    "causal": lambda dtype: {"mask": masks.causal()},
    "window": lambda dtype: {"mask": block_mask(WINDOW, 40, 50)},
    "relative-bias": lambda dtype: {
        "mask": masks.causal(),
        "bias": helpers.randn(2, 89, seed=7, dtype=dtype, grad=True),
    },
    "dense-bias": lambda dtype: {
        "bias": helpers.randn(1, 2, 40, 1, seed=7, dtype=dtype, grad=True)
    },
    "sinks": lambda dtype: {
        "mask": WINDOW,
        "sinks": helpers.randn(2, seed=7, dtype=dtype, grad=True),
    },
    "softcap": lambda dtype: {"mask": WINDOW, "softcap": 2.0},
    "dropout": lambda dtype: {"mask": masks.causal(), "dropout_p": 0.3, "dropout_seed": 7},
    "decode": lambda dtype: {
        "mask": block_mask(masks.causal(), 50),
        "query_offset": torch.tensor([8], dtype=torch.int32),
        "kv_lengths": torch.tensor([45], dtype=torch.int32),
    },
}
