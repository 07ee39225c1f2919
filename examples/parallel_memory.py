"""A decoder that reads an encoder and writes a whole answer in two calls.

    python -m examples.parallel_memory

The task: names from Python's standard library, one letter a token, are to be written backwards. An
encoder reads the name. The decoder is trained on [CLS] + the first letters of the answer, as many
as chance decides for each sample, followed by a [MASK] in every later place. A place sees its
sample's prefix and itself (`masks.pinned(lengths)`), so nothing it says depends on other places.

Decoding: one call on [CLS] predicts the first letter, a second one on [CLS] + first letter and all
places predicts the rest. The same places one by one, in calls of their own, give the same letters.
"""

from __future__ import annotations

import argparse
import re
import time

import torch
from torch import Tensor, nn

from examples.text import standard_library
from examples.training import train
from flashmark.generation import predict_in_parallel
from flashmark.masks import causal, pinned
from flashmark.models import Decoder, DecoderConfig
from flashmark.objectives import IGNORED, token_loss

PADDING, END, CLS, MASK = range(4)
VOCABULARY, LONGEST, BATCH = 128, 10, 64


class Reader(nn.Module):
    """Encoder and decoder: the decoder's layers read the encoder's output by cross-attention."""

    def __init__(self, width: int = 64):
        super().__init__()
        sizes = {"width": width, "layers": 2, "heads": 4, "hidden": 2 * width}
        self.encoder = Decoder(DecoderConfig(VOCABULARY, attention="bidirectional", **sizes))
        self.encoder.head = nn.Identity()  # hidden states instead of logits
        self.decoder = Decoder(DecoderConfig(VOCABULARY, memory_dim=width, **sizes))

    def given(self, source: Tensor):
        """The decoder with the encoder's output for `source`, padded on the right."""
        key_mask = source != PADDING
        return self.decoder.given(self.encoder(source, key_mask=key_mask), key_mask=key_mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    names = short_names()
    unseen, training = names[::20], [x for n, x in enumerate(names) if n % 20]
    torch.manual_seed(0)
    model, generator = Reader(), torch.Generator().manual_seed(0)

    def loss(name: str, model: Reader, step: int) -> Tensor:
        chosen = torch.randint(len(training), (BATCH,), generator=generator).tolist()
        source, answer = batch([training[n] for n in chosen])
        return loss_of_places(model, source, answer, generator)

    losses = train({"reader": model}, loss, steps)["reader"]
    print(f"\nloss of a letter: {losses[0]:.2f} nats before, {losses[-1]:.3f} after {steps} steps")
    source, answer = batch(unseen)
    written = decode(model, source)
    wanted = answer.masked_fill(answer == IGNORED, PADDING)
    right = (written == wanted).all(1)
    print(f"names never seen, backwards in two calls: {int(right.sum())} of {len(unseen)} right:")
    for name, row in list(zip(unseen, written.tolist(), strict=True))[:5]:
        print(f"   {name:>{LONGEST}} -> {text(row)}")
    print(f"all places in one call against one by one: {one_by_one(model, source[:8])}")
    print(f"prefixes of different lengths in one call against each alone: "
          f"{each_alone(model, source[:8], written[:8])}")  # fmt: skip
    print(f"\n{steps} steps of {BATCH} names, {time.perf_counter() - began:.0f} s in all.")


def short_names() -> list[str]:
    found = bytes(torch.cat(standard_library()).tolist()).decode("utf-8", errors="ignore")
    return sorted({x for x in re.findall(r"\b[a-z]+\b", found) if 3 <= len(x) < LONGEST})


def batch(names: list[str]) -> tuple[Tensor, Tensor]:
    """Names and their answers (B, LONGEST): letters, end token, then PADDING or IGNORED."""
    source = torch.full((len(names), LONGEST), PADDING)
    answer = torch.full((len(names), LONGEST), IGNORED)
    for row, name in enumerate(names):
        source[row, : len(name)] = torch.tensor(list(name.encode()))
        answer[row, : len(name) + 1] = torch.tensor([*name[::-1].encode(), END])
    return source, answer


def loss_of_places(model: Reader, source: Tensor, answer: Tensor, generator) -> Tensor:
    """[CLS] and the first letters of each answer are given, every later place is a [MASK]."""
    given = torch.cat([torch.full_like(answer[:, :1], CLS), answer[:, :-1]], 1)
    # no more letters than there are; 1 is [CLS] alone
    lengths = 1 + (torch.rand(len(answer), generator=generator) * (answer != IGNORED).sum(1)).long()
    inputs = given.masked_fill(torch.arange(LONGEST) >= lengths[:, None], MASK)
    logits = model.given(source)(inputs, mask=causal() & pinned(lengths))
    # a letter inside the prefix is predicted by the one before it, as in any decoder
    return token_loss(logits, answer)


@torch.no_grad()
def decode(model: Reader, source: Tensor) -> Tensor:
    """Letters (B, LONGEST), PADDING after the end token."""
    given = model.given(source)
    first = given(torch.full((len(source), 1), CLS))[:, -1].argmax(-1)  # the first prediction
    prefix = torch.stack([torch.full_like(first, CLS), first], 1)
    places = torch.full((len(source), LONGEST - 2), MASK)
    logits = predict_in_parallel(given, prefix, places, mask=causal() & pinned(2))
    # the last token of the prefix predicts as well: run it with the places
    second = given(prefix, mask=causal() & pinned(2))[:, -1:].argmax(-1)
    written = torch.cat([first[:, None], second, logits.argmax(-1)], 1)
    ended = ((written == END).cumsum(1) - (written == END).long()) > 0
    return written.masked_fill(ended, PADDING)


@torch.no_grad()
def one_by_one(model: Reader, source: Tensor) -> str:
    """Each place is asked for in a call of its own, the others hold other tokens."""
    given = model.given(source)
    prefix = torch.tensor([[CLS, 97]]).expand(len(source), -1)
    places = torch.full((len(source), LONGEST - 2), MASK)
    mask = causal() & pinned(2)
    together = predict_in_parallel(given, prefix, places, mask=mask)
    for place in range(places.shape[1]):
        others = torch.full_like(places, END)
        others[:, place] = MASK
        alone = predict_in_parallel(given, prefix, others, mask=mask)
        if not torch.equal(alone[:, place], together[:, place]):
            return "DIFFERENT"
    return "the same bits"


@torch.no_grad()
def each_alone(model: Reader, source: Tensor, written: Tensor) -> str:
    """Samples know 1, 2, 3, ... tokens of their answers; all are decoded in one call."""
    lengths = 1 + torch.arange(len(source)) % 4
    longest = int(lengths.max())
    prefix = torch.cat([torch.full_like(written[:, :1], CLS), written[:, : longest - 1]], 1)
    key_mask = torch.arange(longest) < lengths[:, None]
    places = torch.full((len(source), 4), MASK)
    mask = causal() & pinned(lengths)
    together = predict_in_parallel(
        model.given(source), prefix, places, key_mask=key_mask, mask=mask
    )
    for row, n in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = predict_in_parallel(
            model.given(source[one]), prefix[one, :n], places[one], mask=causal() & pinned(n)
        )
        if (alone[0] - together[row]).abs().max() > 1e-3:
            return "DIFFERENT"
    return "the same"


def text(tokens: list[int]) -> str:
    return bytes(x for x in tokens if x > MASK).decode(errors="replace")


if __name__ == "__main__":
    main()
