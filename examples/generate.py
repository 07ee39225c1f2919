"""Trains a little, then generates with caches: a batch of different lengths, several attentions.

    python -m examples.generate

Shows, for exact, Nyström and hybrid attention: that generation with a cache gives what one without
gives, token by token; that a prompt in a padded batch continues as it does alone; what a token
costs both ways; and samples.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from examples.text import BYTES, random_batches, readable, standard_library
from examples.training import train
from flashmark.generation import generate
from flashmark.models import Decoder, DecoderConfig
from flashmark.objectives import token_loss

ATTENTIONS = "exact", "nystrom", "hybrid"
PROMPTS = ["def __init__(self, ", "    return ", "import os\nimport ", "        if self._"]
NEW = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    training, _ = standard_library()
    models, batches = {}, {}
    for name in ATTENTIONS:
        torch.manual_seed(0)
        config = DecoderConfig(
            BYTES, width=128, layers=2, heads=4, kv_heads=2, hidden=256, attention=name,
            window=32, landmarks=16, convolution=4 if name == "nystrom" else 0,
        )  # fmt: skip
        models[name] = Decoder(config)
        batches[name] = random_batches(training, 8, 128, seed=0)

    def loss(name: str, model: Decoder, step: int) -> Tensor:
        text = next(batches[name])
        return token_loss(model(text[:, :-1]), text[:, 1:])

    train(models, loss, steps)

    prompts, key_mask = padded(PROMPTS)
    print(f"\n{len(PROMPTS)} prompts of {sorted(map(len, PROMPTS))} bytes in one batch, "
          f"{NEW} bytes after each")  # fmt: skip
    print(f"{'attention':>10}{'cached = uncached':>20}{'batch = alone':>16}"
          f"{'ms a byte cached':>19}{'uncached':>11}")  # fmt: skip
    for name, model in models.items():
        start = time.perf_counter()
        cached = generate(model, prompts, NEW, key_mask=key_mask)
        middle = time.perf_counter()
        uncached = without_cache(model, prompts, key_mask)
        end = time.perf_counter()
        rows = zip(prompts, key_mask, strict=True)
        alone = torch.cat([generate(model, row[keep][None], NEW) for row, keep in rows])
        times = (middle - start) / NEW * 1e3, (end - middle) / NEW * 1e3
        same = yes(torch.equal(cached, uncached)), yes(torch.equal(cached, alone))
        print(f"{name:>10}{same[0]:>20}{same[1]:>16}{times[0]:>19.1f}{times[1]:>11.1f}")

    for title, options in {
        "the likeliest bytes": {},
        "sampled, temperature 0.8, top-k 40, top-p 0.95": {
            "temperature": 0.8, "top_k": 40, "top_p": 0.95,
        },
    }.items():  # fmt: skip
        print(f"\n{title}:")
        for name, model in models.items():
            generator = torch.Generator().manual_seed(0)
            out = generate(
                model, prompts, NEW, key_mask=key_mask, chunk=8, generator=generator, **options
            )
            for prompt, new in list(zip(PROMPTS, out, strict=True))[:2]:
                print(f"{name:>10}  {prompt.strip()!r} {readable(new)}")
    print(f"\n{steps} steps each, {time.perf_counter() - began:.0f} s in all.")


def padded(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Bytes (B, N), padded on the left, and which of them take part."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + list(p.encode()) for p in prompts]
    lengths = torch.tensor([len(p) for p in prompts])
    return torch.tensor(rows), torch.arange(longest) >= longest - lengths[:, None]


@torch.no_grad()
def without_cache(model: Decoder, tokens: Tensor, key_mask: Tensor) -> Tensor:
    for _ in range(NEW):
        new = model(tokens, key_mask=key_mask)[:, -1].argmax(-1)[:, None]
        tokens = torch.cat([tokens, new], 1)
        key_mask = torch.cat([key_mask, torch.ones_like(new, dtype=torch.bool)], 1)
    return tokens[:, -NEW:]


def yes(same: bool) -> str:
    return "same bytes" if same else "DIFFERENT"


if __name__ == "__main__":
    main()
