"""`python -m flashmark`: what is installed, and a self-check of each backend that can run.

A small call of every operator is held to its float64 definition, outputs and gradients. The exit
status is 1 where one is over its budget or raises. A bug report starts with this output.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

import flashmark
from flashmark.config import OPERATORS, devices
from flashmark.dispatch import CAN_RUN

DTYPES = torch.float32, torch.bfloat16
BATCH, HEADS, KV_HEADS, TOKENS, WIDTH, LANDMARKS, WINDOW = 1, 4, 2, 150, 32, 16, 32
BLOCK, TOP_K = 16, 2


def main() -> int:
    """Print the configuration and the checks; 0 where all passed, else 1."""
    print(flashmark.show_config())
    print(f"\nself-check over {TOKENS} tokens: outputs and gradients against float64")
    print("ok (largest error as a share of its budget)")
    start = time.perf_counter()
    failures = 0
    for device in devices():
        for operator in OPERATORS:
            for backend, can_run in CAN_RUN.items():
                for dtype in DTYPES:
                    if not can_run(operator, torch.empty(1, 1, 1, 1, device=device, dtype=dtype)):
                        continue
                    result = self_check(operator, backend, device, dtype)
                    failures += not result.startswith("ok")
                    where = (
                        f"{operator} on {device}, {backend}, {str(dtype).removeprefix('torch.')}"
                    )
                    print(f"  {where:<44} {result}", flush=True)
    verdict = f"{failures} FAILED" if failures else "all passed"
    print(f"{verdict} in {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


def self_check(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """One line on an operator's errors: it starts with "ok" where they are within budget."""
    query, key, value, landmarks = sample(device, dtype)
    try:
        if operator == "block_sparse":
            mask = flashmark.masks.causal() & flashmark.masks.sliding_window(WINDOW)
            report = flashmark.check(
                flashmark.block_sparse_attention, query, key, value, mask, backend=backend
            )
        elif operator == "nystrom":
            report = flashmark.check(
                flashmark.nystrom_attention, query, key, value, landmarks, backend=backend
            )
        elif operator == "routed":
            report = flashmark.check(
                flashmark.routed_attention,
                *(query, key, value, landmarks),
                block_size=BLOCK,
                top_k=TOP_K,
                backend=backend,
            )
        else:
            report = flashmark.check(
                flashmark.hybrid_attention,
                *(query, key, value, landmarks),
                window=WINDOW,
                backend=backend,
            )
    except Exception as error:  # whatever it is, it belongs in the report
        return f"RAISED {type(error).__name__}: {error}"
    share = max(row.error / row.budget for row in report.rows)
    return f"ok ({share:.2f})" if report.ok else f"OVER BUDGET\n{report}"


def sample(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value and landmarks of a small grouped call, the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    heads = (HEADS, KV_HEADS, KV_HEADS)
    qkv = [normal(BATCH, h, TOKENS, WIDTH) for h in heads]
    return *qkv, normal(KV_HEADS, LANDMARKS, WIDTH, dtype=torch.float32)


if __name__ == "__main__":
    sys.exit(main())
