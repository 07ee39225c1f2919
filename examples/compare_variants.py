"""The attentions that are compared: modules from query, key, value to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashmark
from examples.leaky import leaky_segment_attention
from flashmark import variants
from flashmark.masks import Mask, causal, sliding_window
from flashmark.nn import apply_rotary, rotary_angles


class Exact(nn.Module):
    """Exact attention over the keys that a mask shows."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.mask = mask

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flashmark.block_sparse_attention(query, key, value, self.mask)


class Rotated(nn.Module):
    """An attention whose queries and keys know their position in the first half of a head."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        positions = torch.arange(query.shape[2], device=query.device)[None]
        angles = rotary_angles(positions, query.shape[3] // 2)
        return self.attention(apply_rotary(query, angles), apply_rotary(key, angles), value)


class Nystrom(nn.Module):
    """Learned landmarks alone; `inverse=False` reads them as they are, W = F, without the core."""

    def __init__(
        self, heads: int, width: int, count: int, *, inverse: bool = True, decay: bool = False
    ):
        super().__init__()
        self.landmarks = nn.Parameter(flashmark.init_landmarks(heads, count, width))
        self.inverse = inverse
        self.landmark_decay = None
        if decay:  # memories of 1 to 8000 tokens
            self.landmark_decay = nn.Parameter(-torch.linspace(0, 9, count).repeat(heads, 1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        core = None
        if not self.inverse:
            core = flashmark.landmark_core(self.landmarks, method="identity")
        decay = None if self.landmark_decay is None else self.landmark_decay.exp()
        return flashmark.nystrom_attention(
            query, key, value, self.landmarks, core=core, decay=decay
        )


class Hybrid(nn.Module):
    """Exact nearby, learned landmarks far away. The gate is a sigmoid of each query.

    Landmarks have no position: they live in the half of a head that `Rotated` does not turn.
    """

    def __init__(self, heads: int, width: int, count: int, *, window: int, merge: str):
        super().__init__()
        self.turned = width // 2
        self.landmarks = nn.Parameter(flashmark.init_landmarks(heads, count, width - self.turned))
        self.window, self.merge = window, merge
        self.gate = nn.Parameter(torch.zeros(heads, 1, width)) if merge == "gate" else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gate = None
        if self.gate is not None:
            gate = torch.sigmoid((query * self.gate).sum(-1, keepdim=True))
        landmarks = F.pad(self.landmarks, (self.turned, 0))
        return flashmark.hybrid_attention(
            query, key, value, landmarks, window=self.window, merge=self.merge, gate=gate
        )


class Routed(nn.Module):
    """Exact over the own block, the one before, and those that the token chooses.

    `count` landmarks a head summarise a block, its mean key where it is 0. A `learned` router gets
    `routing` from each call, for `flashmark.objectives.routing_loss`. With `all_blocks` a token
    chooses every block: that is exact attention, and a learned router is told of them all.
    """

    def __init__(
        self, heads: int, width: int, count: int, *, block: int, top_k: int, learned: bool = False
    ):
        super().__init__()
        self.landmarks = None
        if count:
            marks = flashmark.init_landmarks(heads, count, width)
            self.landmarks = nn.Parameter(marks, requires_grad=learned)
        self.block, self.top_k, self.learned = block, top_k, learned
        self.all_blocks = False
        self.routing: flashmark.Routing | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asked = self.learned and torch.is_grad_enabled()
        top_k = key.shape[2] // self.block if self.all_blocks else self.top_k
        found = flashmark.routed_attention(
            query, key, value, self.landmarks, block_size=self.block, top_k=top_k, near=1,
            return_routing=asked,
        )  # fmt: skip
        if not asked:
            return found
        out, self.routing = found
        return out


class Function(nn.Module):
    """An attention without parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value, **self.options)


class TorchExact(nn.Module):
    """PyTorch's own, where a clock compares."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


LEAKY = "leaky segment means"


class Variant(NamedTuple):
    """`make(heads, head width, window, landmarks, top_k)` is the attention of a layer.

    `reads(tokens, window, landmarks, top_k)` is how many keys and slots a token reads at most.
    """

    make: Callable[[int, int, int, int, int], nn.Module]
    reads: Callable[[int, int, int, int], int]
    rotary: bool = True  # not with learned landmarks alone: they stand at no position
    after_exact: bool = False  # the trained weights of exact attention, on which it is put


def _landmarks(n: int, w: int, m: int, k: int) -> int:
    return m


def _hybrid(n: int, w: int, m: int, k: int) -> int:
    return 2 * w + m


def _by(count: int, *, after_exact: bool = False, learned: bool = False) -> Variant:
    """Routed attention that chooses by `count` landmarks a block, or 0: by its mean key."""
    return Variant(
        lambda h, d, w, m, k: Routed(h, d, count, block=w, top_k=k, learned=learned),
        lambda n, w, m, k: min(n, (k + 2) * w),
        after_exact=after_exact,
    )


VARIANTS = {
    "exact": Variant(lambda h, d, w, m, k: Exact(causal()), lambda n, w, m, k: n),
    # as wide as the near field of a hybrid ever gets
    "window only": Variant(
        lambda h, d, w, m, k: Exact(causal() & sliding_window(2 * w)), lambda n, w, m, k: 2 * w
    ),
    "landmarks": Variant(lambda h, d, w, m, k: Nystrom(h, d, m), _landmarks, rotary=False),
    "landmarks, decay": Variant(
        lambda h, d, w, m, k: Nystrom(h, d, m, decay=True), _landmarks, rotary=False
    ),
    "landmarks, no core": Variant(
        lambda h, d, w, m, k: Nystrom(h, d, m, inverse=False), _landmarks, rotary=False
    ),
    "first-k": Variant(
        lambda h, d, w, m, k: Function(variants.first_k_attention, first=m), _landmarks
    ),
    "segment": Variant(
        lambda h, d, w, m, k: Function(variants.segment_attention, segment=w),
        lambda n, w, m, k: -(-n // w) - 1 + w,
    ),
    "hybrid slots": Variant(
        lambda h, d, w, m, k: Hybrid(h, d, m, window=w, merge="slots"), _hybrid
    ),
    "hybrid mass": Variant(lambda h, d, w, m, k: Hybrid(h, d, m, window=w, merge="mass"), _hybrid),
    "hybrid gate": Variant(lambda h, d, w, m, k: Hybrid(h, d, m, window=w, merge="gate"), _hybrid),
    "routed mean": _by(0),
    "routed 2": _by(2),
    "routed 4": _by(4),
    "routed 8": _by(8),
    "exact, then routed mean": _by(0, after_exact=True),
    "exact, then routed 2": _by(2, after_exact=True),
    "exact, then routed 4": _by(4, after_exact=True),
    "exact, then routed 8": _by(8, after_exact=True),
    "exact, then routed 2, trained": _by(2, after_exact=True, learned=True),
    "exact, then routed 4, trained": _by(4, after_exact=True, learned=True),
    "exact, then routed 8, trained": _by(8, after_exact=True, learned=True),
    LEAKY: Variant(
        lambda h, d, w, m, k: Function(leaky_segment_attention, num_landmarks=2 * m),
        lambda n, w, m, k: 2 * m,
    ),
}
