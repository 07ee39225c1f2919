"""Trains a bidirectional model to guess masked bytes of Python source, short sequences first.

    python -m examples.masked_lm

15 % of the bytes are chosen: 80 % of them masked, 10 % replaced, 10 % kept. Line breaks are never
masked. The length starts at 32 bytes and doubles up to 256; batches hold as many bytes throughout.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from examples.text import BYTES, random_batches, readable, standard_library
from examples.training import train
from flashmark.models import DecoderConfig, MaskedLM
from flashmark.objectives import IGNORED, corrupt, growing_length, token_loss

MASK, PADDING = BYTES, BYTES + 1
SHORTEST, LONGEST, BATCH_BYTES = 32, 256, 2048
NEWLINE = ord("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    training, validation = standard_library()
    torch.manual_seed(0)
    model = MaskedLM(DecoderConfig(BYTES + 2, width=128, layers=2, heads=4, hidden=256))
    report: list[tuple[int, int, float, float]] = []
    lengths = [growing_length(step, steps, SHORTEST, LONGEST) for step in range(steps)]
    batches = {
        n: random_batches(training, BATCH_BYTES // n, n - 1, seed=n) for n in sorted(set(lengths))
    }
    generator = torch.Generator().manual_seed(0)

    def loss(name: str, model: MaskedLM, step: int) -> Tensor:
        if step and lengths[step] != lengths[step - 1]:
            report.append((step, lengths[step - 1], *measure(model, validation)))
        tokens = padded(next(batches[lengths[step]]), generator)
        inputs, labels = masked(tokens, generator)
        return token_loss(model(inputs, key_mask=tokens != PADDING), labels)

    train({"masked LM": model}, loss, steps)
    report.append((steps, lengths[-1], *measure(model, validation)))

    print(f"\nOn unseen text, {LONGEST} bytes at a time:")
    print("   after steps   trained at length   bits a masked byte   masked bytes guessed")
    for step, length, bits, right in report:
        print(f"{step:>14}{length:>20}{bits:>21.2f}{right:>22.1%}")
    counts = torch.bincount(validation)
    print(f"the commonest byte, {chr(int(counts.argmax()))!r}, would be right in "
          f"{counts.max() / counts.sum():.1%}")  # fmt: skip
    show(model, validation)
    print(f"\n{steps} steps of {BATCH_BYTES} bytes, {time.perf_counter() - began:.0f} s in all.")


def padded(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """As texts of different lengths come: padding after a random part of each, at least half."""
    length = tokens.shape[1]
    ends = torch.randint(length // 2, length + 1, (len(tokens), 1), generator=generator)
    return tokens.masked_fill(torch.arange(length) >= ends, PADDING)


def masked(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return corrupt(
        tokens, vocab_size=BYTES, mask_token=MASK, protected=(PADDING, NEWLINE), generator=generator
    )


@torch.no_grad()
def measure(model: MaskedLM, text: Tensor) -> tuple[float, float]:
    """Bits for a masked byte, and the share of them that is guessed."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    tokens = next(random_batches(text, 64, LONGEST - 1, seed=1))
    inputs, labels = masked(tokens, generator)
    labels[inputs != MASK] = IGNORED
    logits = model(inputs)
    model.train()
    hidden = inputs == MASK
    right = (logits.argmax(-1) == tokens)[hidden].float().mean().item()
    return token_loss(logits, labels).item() / math.log(2), right


def show(model: MaskedLM, text: Tensor) -> None:
    tokens = next(random_batches(text, 1, 99, seed=5))
    generator = torch.Generator().manual_seed(3)
    _, labels = masked(tokens, generator)
    hidden = tokens.masked_fill(labels != IGNORED, MASK)
    filled = model.fill(hidden, MASK)
    print("\n   masked  " + readable(hidden.masked_fill(hidden == MASK, ord("_"))[0]))
    print("   filled  " + readable(filled[0]))
    print("   text    " + readable(tokens[0]))


if __name__ == "__main__":
    main()
