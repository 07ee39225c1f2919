"""Trains a T5-style encoder-decoder to rewrite names: parse_config_file -> ParseConfigFile.

    python -m examples.encoder_decoder

Names are two words of those in Python's standard library, read and written letter by letter. Then:
names it has not seen; a forward of all letters at once against decoding letter by letter with a
cache; and the relative position bias, computed in the first layer and shared by all.
"""

from __future__ import annotations

import argparse
import re
import time

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples.text import standard_library
from examples.training import train
from flashmark.generation import generate
from flashmark.models import T5, T5Config
from flashmark.objectives import IGNORED

PADDING, END, START, VOCABULARY = 0, 1, 2, 128  # letters are their ASCII codes
BATCH, LONGEST = 64, 11  # letters of a name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    words = short_words()
    unseen = random_names(words, 200, torch.Generator().manual_seed(1))

    torch.manual_seed(0)
    model = T5(
        T5Config(
            VOCABULARY, width=64, heads=4, head_dim=16, hidden=128, buckets=16, max_distance=16,
            padding_token=PADDING, start_token=START,
        )
    )  # fmt: skip

    def loss(name: str, model: T5, step: int) -> Tensor:
        names = random_names(words, BATCH, generator)
        source, labels = batch([name for name in names if name not in unseen])
        return model(source, labels=labels, key_mask=source != PADDING).loss

    generator = torch.Generator().manual_seed(0)
    losses = train({"T5": model}, loss, steps, peak=5e-3)["T5"]
    print(f"\nloss of a letter: {losses[0]:.2f} nats before, {losses[-1]:.3f} after {steps} steps")

    written = write(model, unseen)
    right = sum(a == camel_case(b) for a, b in zip(written, unseen, strict=True))
    print(f"names never seen, written letter by letter: {right} of {len(unseen)} right; some:")
    for name, answer in list(zip(unseen, written, strict=True))[:6]:
        verdict = "" if answer == camel_case(name) else "wrong"
        print(f"   {name:>{LONGEST}} -> {answer:<{LONGEST}} {verdict}")
    print(f"\nall letters at once against one by one with a cache: {step_error(model, unseen):.1e}")
    print_bias(model)
    print(f"\n{steps} steps of {BATCH} names, {time.perf_counter() - began:.0f} s in all.")


def short_words() -> list[str]:
    """Words of 2 to 5 letters, from the names in the library."""
    text = bytes(torch.cat(standard_library()).tolist()).decode("utf-8", errors="ignore")
    names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text))
    words = {word for name in names for word in name.split("_")}
    return sorted(word for word in words if 2 <= len(word) <= 5)


def random_names(words: list[str], count: int, generator: torch.Generator) -> list[str]:
    """Random names of two words each."""
    pairs = torch.randint(len(words), (count, 2), generator=generator).tolist()
    return [f"{words[first]}_{words[second]}" for first, second in pairs]


def camel_case(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def letters(word: str) -> Tensor:
    return torch.tensor([*word.encode(), END])


def batch(names: list[str]) -> tuple[Tensor, Tensor]:
    """Sources, padded on the right, and labels."""
    sources = pad_sequence([letters(x) for x in names], True, PADDING)
    return sources, pad_sequence([letters(camel_case(x)) for x in names], True, IGNORED)


def write(model: T5, names: list[str]) -> list[str]:
    source, _ = batch(names)
    given = model.given(source, key_mask=source != PADDING)
    start = torch.full((len(names), 1), START)
    out = generate(given, start, LONGEST + 1, end_token=END, padding_token=PADDING)
    return [bytes(x for x in row if x > END).decode() for row in out.tolist()]


@torch.no_grad()
def step_error(model: T5, names: list[str]) -> float:
    """Largest difference of a logit."""
    source, labels = batch(names)
    mask = source != PADDING
    target = torch.cat([torch.full((len(names), 1), START), labels[:, :-1].clamp_min(0)], 1)
    whole = model(source, target, key_mask=mask).logits
    given = model.given(source, key_mask=mask)
    cache = given.init_cache(len(names), target.shape[1])
    steps = torch.cat([given(letter, cache=cache) for letter in target.split(1, dim=1)], 1)
    return (steps - whole).abs().max().item()


@torch.no_grad()
def print_bias(model: T5) -> None:
    print("bias of the decoder's scores for a letter 0, 1, 2, ... places back, a row a head:")
    for head in model.decoder.bias(8, 8)[:, :8].flip(1).tolist():
        print("   " + "".join(f"{x:>7.2f}" for x in head))


if __name__ == "__main__":
    main()
