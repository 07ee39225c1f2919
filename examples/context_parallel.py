"""Attention over a sequence that 4 processes hold: equal to one process, and the bytes that moved.

    python -m examples.context_parallel
    torchrun --nproc-per-node 4 examples/context_parallel.py

The table counts the bytes that all ranks send in a forward pass, against an all-gather of keys and
values; the backward pass sends as many the other way.
"""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flashmark import (
    block_sparse_attention,
    compile_mask,
    hybrid_attention,
    init_landmarks,
    nystrom_attention,
)
from flashmark.distributed import (
    balance,
    context_parallel_block_sparse_attention,
    context_parallel_hybrid_attention,
    context_parallel_nystrom_attention,
    shard,
    token_bytes,
    unshard,
)
from flashmark.masks import causal, documents, sliding_window

LENGTH, HEADS, KV_HEADS, DIM = 8192, 8, 2, 64
LANDMARKS, WINDOW = 64, 128


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all ranks draw the same whole tensors
    query, key, value, weights = (
        torch.randn(1, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    lengths = torch.randint(100, 1500, (64,)).cumsum(0)
    ids = torch.searchsorted(lengths, torch.arange(LENGTH), right=True)
    landmarks = init_landmarks(KV_HEADS, LANDMARKS, DIM)
    if dist.get_rank() == 0:
        sizes = f"{HEADS} heads, {KV_HEADS} key heads, D = {DIM}, float32"
        print(f"N = {LENGTH}, {sizes}, {dist.get_world_size()} processes")
        sent = f"{'MB sent':>9}{'all-gather':>12}{'ratio':>7}"
        print(f"{'':<14}{'plan':>12}{'tiles':>12}{sent}{'out':>10}{'gradients':>11}")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    masks = {
        "causal": causal(),
        "window 512": causal() & sliding_window(512),
        "documents": causal() & documents(ids),
    }
    for name, mask in masks.items():
        mask = compile_mask(mask, 1, HEADS, LENGTH, LENGTH, device="cpu")
        plan = balance(mask, dist.get_world_size())
        mine = [shard(x, plan) for x in leaves]
        found = context_parallel_block_sparse_attention(*mine, plan)
        wanted = block_sparse_attention(*leaves, mask)
        a_token = token_bytes(KV_HEADS, DIM, dtype=torch.float32)
        sent = sum(plan.bytes_sent(rank, a_token) for rank in range(plan.ranks))
        tiles = f"{int(plan.tiles.min())}..{int(plan.tiles.max())}"
        segments = max(len(plan.segments(rank)) for rank in range(plan.ranks))
        shape = f"{segments} segment" + "s" * (segments > 1)
        report(name, shape, tiles, sent, plan, found, wanted, weights, leaves)
    plan = balance(mask, dist.get_world_size(), method="contiguous")
    mine = [shard(x, plan) for x in leaves]
    found = context_parallel_nystrom_attention(*mine, landmarks)
    wanted = nystrom_attention(*leaves, landmarks)
    states = plan.ranks * (plan.ranks - 1) * KV_HEADS * LANDMARKS * 4
    sent = states * (DIM + 1)
    report("Nyström", "1 segment", "-", sent, plan, found, wanted, weights, leaves)
    mine = [shard(x, plan) for x in leaves]
    options = {"window": WINDOW, "merge": "slots"}
    found = context_parallel_hybrid_attention(*mine, landmarks, **options)
    wanted = hybrid_attention(*leaves, landmarks, **options)
    halos = (plan.ranks - 1) * WINDOW * KV_HEADS * (2 * DIM + 1) * 4
    sent = states * (2 * DIM + 1) + halos
    report(f"hybrid {WINDOW}", "1 segment", "-", sent, plan, found, wanted, weights, leaves)
    dist.destroy_process_group()


def report(name, shape, tiles, sent, plan, found, wanted, weights, leaves) -> None:
    """Compare with one process, which every rank has computed for itself."""
    whole = unshard(found, plan)
    gradients = torch.autograd.grad((found * shard(weights, plan)).sum(), leaves)
    expected = torch.autograd.grad((wanted * weights).sum(), leaves)
    errors = []
    for gradient, exact in zip(gradients, expected, strict=True):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # of the whole tensors, each rank has the gradient of its tokens
        errors.append(error(gradient, exact))
    everything = sum(
        plan.bytes_all_gather(rank, token_bytes(KV_HEADS, DIM, dtype=torch.float32))
        for rank in range(plan.ranks)
    )
    if dist.get_rank() == 0:
        megabytes = f"{sent / 1e6:>9.3f}{everything / 1e6:>12.3f}{sent / everything:>7.3f}"
        differences = f"{error(whole, wanted):>10.1e}{max(errors):>11.1e}"
        print(f"{name:<14}{shape:>12}{tiles:>12}{megabytes}{differences}")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def _process(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    main()
    sys.stdout.flush()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        main()
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        mp.spawn(_process, (4, port), 4)
