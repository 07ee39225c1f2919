"""Counted costs of attention over many ranks: FLOP and bytes, forward and backward.

`python -m bench.communication --help` prints tables for any number of ranks. Nothing here is
measured: rates of computing and of links are given by the user.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.distributed.plan import METHODS, ContextPlan, balance, token_bytes
from flashmark.masks import Mask, causal, compile_mask, documents, sliding_window


class Cost(NamedTuple):
    """Cost of one layer on the rank that has most of each quantity; a mean where it says so."""

    tokens: int
    flops: int  # forward
    mean_flops: float
    backward_flops: int
    bytes_received: int  # forward; the backward pass sends as many
    bytes_sent: int
    bytes_all_gather: int  # received, if all keys and values went everywhere

    def seconds(self, flop_rate: float, bandwidth: float) -> tuple[float, float]:
        """Computing and moving, forward and backward: FLOP/s, and bytes/s in each direction."""
        moved = max(self.bytes_received, self.bytes_sent) * 2
        return (self.flops + self.backward_flops) / flop_rate, moved / bandwidth


def block_sparse_cost(
    plan: ContextPlan,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Whole tiles are counted: 2 products forward, 5 backward, exact for FULL tiles."""
    v_dim, mask = v_dim or head_dim, plan.mask
    repeats = batch * heads // (mask.batch * mask.heads)
    pairs = plan.tiles * mask.block_q * mask.block_kv * repeats
    a_token = token_bytes(kv_heads, head_dim, v_dim, batch=batch, dtype=dtype)
    held = torch.bincount(plan.owner, minlength=plan.ranks) * plan.block
    most = int(pairs.max())
    return Cost(
        tokens=min(int(held.max()), plan.length),
        flops=2 * most * (head_dim + v_dim),
        mean_flops=2 * float(pairs.double().mean()) * (head_dim + v_dim),
        backward_flops=2 * most * (3 * head_dim + 2 * v_dim),
        bytes_received=int(plan.tokens_received.max()) * a_token,
        bytes_sent=int(plan.tokens_sent.max()) * a_token,
        bytes_all_gather=max(0, plan.length - int(held.min())) * a_token,
    )


def nystrom_cost(
    length: int,
    ranks: int,
    landmarks: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    exchange: str = "all-gather",
) -> Cost:
    """Consecutive segments of equal length, no decay. The pass that yields states is counted."""
    v_dim, tokens = v_dim or head_dim, -(-length // ranks)
    keys, queries = batch * kv_heads * tokens, batch * heads * tokens
    width = head_dim + v_dim
    return _linear(
        length, ranks, exchange,
        forward=2 * landmarks * (2 * keys * width + queries * (width + landmarks)),
        backward=2 * landmarks * (6 * keys * width + queries * (3 * width + 3 * landmarks - v_dim)),
        state=batch * kv_heads * landmarks * (v_dim + 1) * torch.float32.itemsize,
        a_token=token_bytes(kv_heads, head_dim, v_dim, batch=batch, dtype=dtype),
    )  # fmt: skip


def hybrid_cost(
    length: int,
    ranks: int,
    landmarks: int,
    *,
    window: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    exchange: str = "all-gather",
) -> Cost:
    """merge="slots" on consecutive segments of equal length. Near keys: 3/2 window a query."""
    v_dim, tokens = v_dim or head_dim, -(-length // ranks)
    keys, queries = batch * kv_heads * tokens, batch * heads * tokens
    seen = queries * (3 * window // 2 + landmarks)
    routed = 2 * keys * landmarks  # twice: for the exchange, and for the outputs
    return _linear(
        length, ranks, exchange,
        forward=2 * (seen * (head_dim + v_dim) + routed * (2 * head_dim + v_dim)),
        backward=2 * (seen * (3 * head_dim + 2 * v_dim) + routed * (5 * head_dim + 2 * v_dim)),
        state=batch * kv_heads * landmarks * (1 + head_dim + v_dim) * torch.float32.itemsize,
        a_token=token_bytes(kv_heads, head_dim, v_dim, batch=batch, dtype=dtype),
        halo=window,
    )  # fmt: skip


def routed_cost(
    length: int,
    ranks: int,
    landmarks: int,
    *,
    block_size: int,
    top_k: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int | None = None,
    batch: int = 1,
    near: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Consecutive segments of equal length; the last rank, which scores the most blocks. Keys are
    counted as if its queries chose every block that they can: the bound on what travels."""
    v_dim, tokens = v_dim or head_dim, -(-length // ranks)
    blocks, own = -(-length // block_size), -(-tokens // block_size)
    a_token = token_bytes(kv_heads, head_dim, v_dim, batch=batch, dtype=dtype)
    pairs = batch * heads * tokens * min((top_k + near + 1) * block_size, length)
    scored = 2 * batch * heads * tokens * (blocks - own // 2) * landmarks * head_dim
    summaries = batch * kv_heads * (blocks - own) * landmarks * (head_dim + 1) * 4
    choices = batch * kv_heads * tokens * top_k + near
    most = min(length - tokens, choices * block_size)
    return Cost(
        tokens=tokens,
        flops=2 * pairs * (head_dim + v_dim) + scored,
        mean_flops=2.0 * pairs * (head_dim + v_dim) + scored / 2,
        backward_flops=2 * pairs * (3 * head_dim + 2 * v_dim),
        bytes_received=most * a_token + summaries,
        bytes_sent=min(ranks - 1, choices) * tokens * a_token + summaries,
        bytes_all_gather=(length - tokens) * a_token,
    )


def _linear(
    length: int,
    ranks: int,
    exchange: str,
    *,
    forward: int,
    backward: int,
    state: int,
    a_token: int,
    halo: int = 0,
) -> Cost:
    tokens = -(-length // ranks)
    states = ranks - 1 if exchange == "all-gather" else (ranks - 1).bit_length() + 1
    moved = (states * state + halo * a_token) * (ranks > 1)
    everything = (length - tokens) * a_token
    return Cost(tokens, forward, forward, backward, moved, moved, everything)


def even_documents(length: int, count: int) -> Tensor:
    """(length,) numbers of `count` documents of equal length."""
    return torch.arange(length) * count // max(1, length)


def table(arguments: argparse.Namespace) -> str:
    shape = {
        "heads": arguments.heads,
        "kv_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "batch": arguments.batch,
    }
    length, window = arguments.length, arguments.window
    masks: dict[str, Mask] = {
        "causal": causal(),
        f"window {window}": causal() & sliding_window(window),
        f"{arguments.documents} documents": causal()
        & documents(even_documents(length, arguments.documents)),
    }
    lines = [
        f"{length:,} tokens, batch {arguments.batch}, {arguments.heads} heads and "
        f"{arguments.kv_heads} key heads of {arguments.head_dim}, bfloat16; the rank that has most",
        f"{arguments.landmarks} landmarks, hybrid with merge='slots' and window {arguments.near}",
        f"{arguments.flops:.3g} FLOP/s, {arguments.bandwidth:.3g} bytes/s each way, no latency",
        f"{'':<16}{'ranks':>7}{'TFLOP':>10}{'balance':>9}{'received':>12}{'all-gather':>12}"
        f"{'compute ms':>12}{'moving ms':>11}",
    ]
    compiled = {
        name: compile_mask(mask, 1, 1, length, length, device="cpu", block_size=128)
        for name, mask in masks.items()
    }
    for ranks in arguments.ranks:
        for name, mask in compiled.items():
            plan = balance(mask, ranks, method=arguments.method)
            lines.append(_row(name, ranks, block_sparse_cost(plan, **shape), arguments))
        for exchange, mark in (("all-gather", ""), ("scan", ", scan")):
            options = shape | {"exchange": exchange}
            cost = nystrom_cost(length, ranks, arguments.landmarks, **options)
            lines.append(_row(f"Nyström{mark}", ranks, cost, arguments))
            cost = hybrid_cost(length, ranks, arguments.landmarks, window=arguments.near, **options)
            lines.append(_row(f"hybrid{mark}", ranks, cost, arguments))
        cost = routed_cost(length, ranks, 4, block_size=64, top_k=arguments.top_k, **shape)
        lines.append(_row("routed, at most", ranks, cost, arguments))
    return "\n".join(lines)


def _row(name: str, ranks: int, cost: Cost, arguments: argparse.Namespace) -> str:
    compute, moving = (1e3 * s for s in cost.seconds(arguments.flops, arguments.bandwidth))
    total = (cost.flops + cost.backward_flops) / 1e12
    balanced = cost.mean_flops / max(1, cost.flops)
    return (
        f"{name:<16}{ranks:>7}{total:>10.3f}{balanced:>9.2f}{_bytes(cost.bytes_received):>12}"
        f"{_bytes(cost.bytes_all_gather):>12}{compute:>12.3f}{moving:>11.3f}"
    )


def _bytes(n: int) -> str:
    return f"{n / 1e6:,.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens of the sequence")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--heads", type=int, default=32, help="on one rank, as the next ones")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--landmarks", type=int, default=64)
    parser.add_argument("--near", type=int, default=256, help="window of the hybrid")
    parser.add_argument("--top-k", type=int, default=16, help="blocks of 64 of routed attention")
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--flops", type=float, default=400e12, help="FLOP/s of a rank")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="bytes/s of a rank's link")
    print(table(parser.parse_args()))


if __name__ == "__main__":
    main()
