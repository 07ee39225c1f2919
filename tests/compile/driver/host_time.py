"""Print the host's microseconds of a call: Python, Triton's launcher, the driver's entry; no GPU.

python -m tests.compile.driver.host_time [--profile]

CPU time, the best of many short rounds, which other work on the machine disturbs least. What
PyTorch computes itself (a fill, a cast) runs on the CPU here, so a figure with much of it is too
high. --profile says where the time of a forward goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import flashmark
from flashmark import arguments, masks
from flashmark.block_sparse.call import Call
from flashmark.kernels import block_sparse
from tests.compile.driver import stub

CALLS, ROUNDS = 25, 80
HALF = torch.bfloat16


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.process_time() - start) / CALLS * 1e6)
    return min(rounds)


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Timed calls, by name."""
    query, key, value = (torch.randn(1, 2, 256, 64, dtype=HALF) for _ in range(3))
    causal, window = (
        masks.compile_mask(x, 1, 1, 256, 256, device="cpu")
        for x in (masks.causal(), masks.sliding_window(100))
    )
    attention = flashmark.block_sparse_attention
    tensors = query, key, value
    dense, sparse = Call(*tensors, causal, 0.125), Call(*tensors, window, 0.125)
    yield "launcher, forward, causal", lambda: block_sparse.forward(dense)
    yield "launcher, forward, window", lambda: block_sparse.forward(sparse)
    yield "forward, BlockMask", lambda: attention(*tensors, window, backend="triton")
    yield "forward, expression", lambda: attention(*tensors, masks.causal(), backend="triton")
    leaves = [x.clone().requires_grad_() for x in tensors]

    def both(deterministic: bool) -> None:
        out = attention(*leaves, window, backend="triton", deterministic=deterministic)
        torch.autograd.grad(out, leaves, out.detach())

    yield "forward and backward, one pass", lambda: both(False)
    yield "forward and backward, two passes", lambda: both(True)
    one = torch.randn(1, 2, 1, 64, dtype=HALF)
    cache = torch.randn(1, 2, 2048, 64, dtype=HALF)
    at, length = torch.tensor([2047], dtype=torch.int32), torch.tensor([2048], dtype=torch.int32)
    options = {"query_offset": at, "kv_lengths": length, "backend": "triton"}
    yield "a decoding step", lambda: attention(one, cache, cache, masks.causal(), **options)
    landmarks, core = torch.zeros(2, 64, 64), torch.zeros(2, 64, 64)
    yield (
        "Nyström, forward",
        lambda: flashmark.nystrom_attention(*tensors, landmarks, core=core, backend="triton"),
    )


def main(profile: bool) -> None:
    torch.set_num_threads(1)
    # no value is read, as none of a GPU's tensors would be
    unread = mock.patch.object(arguments, "readable", lambda tensor: False)
    with stub.launching() as driver, unread:
        for name, call in calls():
            call()
            if profile:
                with cProfile.Profile() as found:
                    for _ in range(CALLS):
                        call()
                pstats.Stats(found).sort_stats("tottime").print_stats(25)
                return
            before = driver.stub_launches()
            call()
            launches = driver.stub_launches() - before
            print(f"{name}: {microseconds(call):.0f} us, launches {launches}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    if reason := stub.why_not():
        raise SystemExit(f"host time needs the stub driver: {reason}")
    main(parser.parse_args().profile)
