"""The two tasks of the comparison: real text, and recall of values from long before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.text import random_batches, standard_library

IGNORED = -100  # a target that is not asked for
KEYS, VALUES, FILLERS = range(0, 16), range(16, 32), range(32, 64)

Batches = Iterator[tuple[Tensor, Tensor]]  # (inputs, targets), each (B, N)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task and the sizes that every attention gets on it."""

    name: str
    score: str  # the `Score` on unseen data that is reported
    context: int
    window: int  # of the hybrids; the near field is this to twice this wide
    landmarks: int
    top_k: int  # blocks of `window` tokens that a routed attention chooses
    batch: int
    batches: Callable[[int, bool], Batches]  # (seed, unseen)


@dataclasses.dataclass(frozen=True)
class Score:
    """On unseen data: mean cost of a target in bits, and the share of targets guessed right."""

    bits: float
    accuracy: float


def text_task(context: int = 256, window: int = 16, landmarks: int = 16, batch: int = 8) -> Task:
    """The next byte of the source of Python's standard library."""
    training, unseen = standard_library()

    def batches(seed: int, held_out: bool) -> Batches:
        for text in random_batches(unseen if held_out else training, batch, context, seed):
            yield text[:, :-1], text[:, 1:]

    return Task("text", "bits", context, window, landmarks, 2, batch, batches)


def recall_task(
    context: int = 48, window: int = 4, landmarks: int = 16, batch: int = 24, pairs: int = 8,
    top_k: int = 2, name: str = "recall",
) -> Task:  # fmt: skip
    """Multi-query associative recall: pairs of a key and its value, later each key once more.

    The pairs stand at random places among fillers. The last 2 * `pairs` tokens are the keys in
    another order, each with its value after it: that value is asked for.
    (Arora et al., "Zoology", 2023.)
    """
    most = min(len(KEYS), context // 4)
    if not 1 <= pairs <= most:
        raise ValueError(f"pairs: expected 1 to {most}, got {pairs}")

    def batches(seed: int, held_out: bool) -> Batches:
        generator = torch.Generator().manual_seed(2 * seed + held_out)
        while True:
            yield _recall(batch, context, pairs, generator)

    return Task(name, "accuracy", context, window, landmarks, top_k, batch, batches)


def _recall(
    batch: int, context: int, pairs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    def distinct(count: int, among: int) -> Tensor:
        return torch.rand(batch, among, generator=generator).argsort(1)[:, :count]

    def drawn(tokens: range, *shape: int) -> Tensor:
        return torch.randint(tokens.start, tokens.stop, shape, generator=generator)

    keys = KEYS.start + distinct(pairs, len(KEYS))
    values = drawn(VALUES, batch, pairs)
    asked = context - 2 * pairs
    tokens = drawn(FILLERS, batch, context)
    said = 2 * distinct(pairs, asked // 2)
    tokens.scatter_(1, said, keys).scatter_(1, said + 1, values)
    again = distinct(pairs, pairs)
    tokens[:, asked::2], tokens[:, asked + 1 :: 2] = keys.gather(1, again), values.gather(1, again)
    targets = torch.full((batch, context), IGNORED)
    targets[:, asked::2] = tokens[:, asked + 1 :: 2]
    return tokens, targets


def loss_in_bits(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return loss / math.log(2)


@torch.no_grad()
def score(model: Callable[[Tensor], Tensor], task: Task, device: torch.device, count: int) -> Score:
    """Score over `count` unseen batches, equal for every model."""
    bits, right, asked = [], 0, 0
    for _, (inputs, targets) in zip(range(count), task.batches(1_000, True), strict=False):
        targets = targets.to(device)
        logits = model(inputs.to(device))
        bits.append(loss_in_bits(logits, targets).item())
        wanted = targets != IGNORED
        right += int((logits.argmax(-1) == targets)[wanted].sum())
        asked += int(wanted.sum())
    return Score(sum(bits) / len(bits), right / asked)
