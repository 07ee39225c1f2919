"""Effect of starting every input with the same token, next to training without it.

    python -m examples.first_token

Sentences are lines of Python's standard library, tokens are words and signs. One model is trained
with a leading [CLS]: it has to predict the first word of a line from nothing. The other is trained
on next-token pairs made from the line alone: its first word is given. Same weights at the start,
same lines, same number of steps.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import time

import torch
from torch import Tensor

from examples.text import standard_library
from examples.training import train
from flashmark.generation import generate
from flashmark.models import Decoder, DecoderConfig
from flashmark.objectives import IGNORED, force_after_end, next_token_pairs, token_loss

PADDING, END, CLS = range(3)
SPECIAL = ["", "<end>", "[CLS]"]
LONGEST, BATCH = 20, 64
STARTS = "leading [CLS]", "line alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    training, validation, words = lines_of_words()
    unseen = validation[:512]

    config = DecoderConfig(len(words), width=128, layers=2, heads=4, hidden=256)
    models = {}
    for name in STARTS:
        torch.manual_seed(0)
        models[name] = Decoder(config)
    curve: dict[str, list[tuple[int, float, float]]] = {name: [] for name in STARTS}

    def loss(name: str, model: Decoder, step: int) -> Tensor:
        if step % (steps // 4) == 0 and step:
            curve[name].append((step, *bits(name, model, unseen)))
        inputs, targets = pairs(name, sample(training, step))
        return token_loss(model(inputs, key_mask=inputs != PADDING), targets)

    train(models, loss, steps)
    for name, model in models.items():
        curve[name].append((steps, *bits(name, model, unseen)))

    print_losses(curve, training)
    print_first_words(models["leading [CLS]"], unseen, words)
    print_samples(models, unseen, words)
    print(f"\n{steps} steps of {BATCH} lines, {time.perf_counter() - began:.0f} s in all.")


def lines_of_words(vocabulary: int = 1000) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """(training, validation) lines as token ids, no line twice, and the word of each id."""
    text = bytes(torch.cat(standard_library()).tolist()).decode("utf-8", errors="ignore")
    unique = dict.fromkeys(line.strip() for line in text.splitlines())
    split = [re.findall(r"\w+|[^\w\s]", line) for line in unique if line[:1].isalpha()]
    split = [line for line in split if 4 <= len(line) < LONGEST]
    counts = collections.Counter(word for line in split for word in line)
    words = SPECIAL + [word for word, _ in counts.most_common(vocabulary - len(SPECIAL))]
    number = {word: n for n, word in enumerate(words)}
    known = [line for line in split if all(word in number for word in line)]
    lines = [torch.tensor([number[word] for word in line]) for line in known]
    return [x for n, x in enumerate(lines) if n % 20], lines[::20], words


def sample(lines: list[Tensor], step: int) -> list[Tensor]:
    chosen = torch.randint(len(lines), (BATCH,), generator=torch.Generator().manual_seed(step))
    return [lines[n] for n in chosen]


def pairs(name: str, lines: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = CLS if name == "leading [CLS]" else None
    return next_token_pairs(lines, end_token=END, padding_token=PADDING, first_token=first)


@torch.no_grad()
def bits(name: str, model: Decoder, lines: list[Tensor]) -> tuple[float, float]:
    """Bits for the first word of a line (nan where it is given) and for a later token."""
    model.eval()
    inputs, targets = pairs(name, lines)
    logits = model(inputs, key_mask=inputs != PADDING)
    later = targets.clone()
    first = math.nan
    if name == "leading [CLS]":
        first = token_loss(logits[:, 0], targets[:, 0]).item() / math.log(2)
        later[:, 0] = IGNORED
    return first, token_loss(logits, later).item() / math.log(2)


def print_losses(curve: dict, training: list[Tensor]) -> None:
    firsts = torch.bincount(torch.stack([line[0] for line in training])).float()
    share = firsts[firsts > 0] / firsts.sum()
    entropy = -(share * share.log2()).sum().item()
    print("\nBits on unseen lines      first word              later tokens (the same ones)")
    print(f"{'steps':>6}" + 2 * "".join(f"{name:>16}" for name in STARTS))
    for rows in zip(*(curve[name] for name in STARTS), strict=True):
        cells = [row[1] for row in rows] + [row[2] for row in rows]
        shown = ("given" if math.isnan(x) else f"{x:.2f}" for x in cells)
        print(f"{rows[0][0]:>6}" + "".join(f"{x:>16}" for x in shown))
    print(f"How often each word comes first has an entropy of {entropy:.2f} bits: after [CLS]")
    print("there is nothing else to learn, and what is left of this loss stays.")


@torch.no_grad()
def print_first_words(model: Decoder, unseen: list[Tensor], words: list[str]) -> None:
    chances = model(torch.tensor([[CLS]]))[0, 0].softmax(-1)
    firsts = collections.Counter(int(line[0]) for line in unseen)
    commonest = firsts.most_common(1)[0][0]
    right = firsts[int(chances.argmax())] / len(unseen)
    print(f"\nAfter [CLS] the model says {words[int(chances.argmax())]!r} for every line: right in")
    print(f"{right:.0%} of them; the commonest first word is {words[commonest]!r}.")


def print_samples(models: dict[str, Decoder], unseen: list[Tensor], words: list[str]) -> None:
    """The likeliest continuation of what each model is given at the start of 6 unseen lines."""
    firsts = list(dict.fromkeys(int(line[0]) for line in unseen))[:6]
    given = {"leading [CLS]": [CLS] * 6, "line alone": firsts}
    print("\nThe likeliest lines, begun with what each model is given:")
    for name, starts in given.items():
        prompts = torch.tensor(starts)[:, None]
        new = generate(models[name], prompts, 12, end_token=END, padding_token=PADDING)
        lines = force_after_end(torch.cat([prompts, new], 1), END, PADDING)
        print(f"  {name}:")
        for line in lines.tolist():
            print("     " + " ".join(words[n] for n in line))


if __name__ == "__main__":
    main()
