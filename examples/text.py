"""Real text that every machine has: the source of Python's own standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256


def standard_library(limit: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """(training, validation) bytes of its source text, split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not left_out & set(path.relative_to(root).parts)
    ]
    parts = bytearray(), bytearray()
    for number, path in enumerate(files):
        parts[number % 20 == 0].extend(path.read_bytes())
    if min(map(len, parts)) < 100_000:
        raise FileNotFoundError(f"no source text of the standard library under {root}")
    return tuple(torch.frombuffer(part[:limit], dtype=torch.uint8).long() for part in parts)


def random_batches(text: Tensor, size: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless (size, context + 1) windows at random places; a seed fixes them."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(context + 1)
    while True:
        start = torch.randint(len(text) - context, (size, 1), generator=generator)
        yield text[start + inside]


def readable(tokens: Tensor) -> str:
    """Bytes as text on one line."""
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    return text.replace("\n", "⏎").replace("\t", "⇥")
