"""Decodes 2,000 tokens after a prompt of 4,000: memory and time per token of each attention.

    python -m examples.long_decode

The weights are random: neither time nor memory depends on them. The last line of the table compares
the last logits with those of one forward over all 6,000 tokens without a cache.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from bench.environment import machine
from bench.progress import progress_bar
from examples.text import BYTES, standard_library
from flashmark.models import Decoder, DecoderConfig

ATTENTIONS = {
    "exact": {"attention": "exact"},
    "Nyström, M = 64": {"attention": "nystrom", "landmarks": 64},
    "hybrid, 128 + M = 64": {"attention": "hybrid", "window": 128, "landmarks": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--new", type=int, default=2000)
    parser.add_argument("--chunk", type=int, default=1000, help="tokens of the prompt at a time")
    arguments = parser.parse_args()
    began = time.perf_counter()
    prompt = standard_library()[1][None, : arguments.prompt]
    columns = {}
    for name, options in ATTENTIONS.items():
        torch.manual_seed(0)
        config = DecoderConfig(BYTES, width=256, layers=2, heads=8, **options)
        columns[name] = decode(name, Decoder(config).eval(), prompt, arguments)

    print(f"\n{arguments.new} tokens after {arguments.prompt}: 2 layers, 8 heads of 32, float32, "
          f"{machine(torch.device('cpu'))}")  # fmt: skip
    print(" " * 34 + "".join(f"{name:>22}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:<34}" + "".join(f"{column[row]:>22}" for column in columns.values()))
    print(f"\n{time.perf_counter() - began:.0f} s in all.")


@torch.no_grad()
def decode(name: str, model: Decoder, prompt: Tensor, arguments) -> dict[str, str]:
    """One column of the table. The loop of `flashmark.generation.generate`, with a clock."""
    total = prompt.shape[1] + arguments.new
    cache = model.init_cache(1, total)
    start = time.perf_counter()
    for chunk in prompt.split(arguments.chunk, dim=1):
        logits = model(chunk, cache=cache)[:, -1:]
    reading = time.perf_counter() - start
    tokens, seconds = [prompt], []
    with progress_bar(arguments.new, name, unit="token") as bar:
        for _ in range(arguments.new):
            start = time.perf_counter()
            tokens.append(logits.argmax(-1))
            logits = model(tokens[-1], cache=cache)
            seconds.append(time.perf_counter() - start)
            bar.update()
    whole = model(torch.cat(tokens, dim=1))[:, -1:]
    error = (logits - whole).abs().max() / whole.abs().max()
    tenth = max(len(seconds) // 10, 1)
    return {
        "reading the prompt, ms": f"{reading * 1e3:.0f}",
        "a token, ms: the first tenth": f"{statistics.median(seconds[:tenth]) * 1e3:.2f}",
        "             the last tenth": f"{statistics.median(seconds[-tenth:]) * 1e3:.2f}",
        "cache, MiB": f"{size(cache) / 2**20:.2f}",
        "last logits against no cache": f"{error:.1e}",
    }


def size(held) -> int:
    """Bytes of all tensors of a cache."""
    if isinstance(held, Tensor):
        return held.untyped_storage().nbytes()
    if isinstance(held, list | tuple):
        return sum(map(size, held))
    return size(list(vars(held).values())) if hasattr(held, "__dict__") else 0


if __name__ == "__main__":
    main()
