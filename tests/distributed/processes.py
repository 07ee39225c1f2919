"""Gloo processes that are started once and run one function after another, all ranks together."""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds for one function
PRELOADED = ["flashmark.distributed.tensor_parallel", "torch._dynamo", "torch.distributed.fsdp"]


class Processes:
    """`run(function, *args)` calls a module-level function on every rank of the default group."""

    def __init__(self, ranks: int, store: str):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.broken = False  # one rank failed, and others may wait for it
        self.pipes, self.members = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = rank, ranks, store, theirs
            self.members.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.members[-1].start()
            self.pipes.append(ours)

    def run(self, function, *args) -> None:
        for pipe in self.pipes:
            pipe.send((function, args))
        self.broken, waiting = True, list(self.pipes)
        while waiting:
            answered = multiprocessing.connection.wait(waiting, TIMEOUT)
            assert answered, f"no answer in {TIMEOUT} s"
            for pipe in answered:
                failure = pipe.recv()
                assert failure is None, f"rank {self.pipes.index(pipe)}: {failure}"
                waiting.remove(pipe)
        self.broken = False

    def stop(self) -> None:
        for pipe, member in zip(self.pipes, self.members, strict=True):
            if self.broken:
                member.kill()
            else:
                pipe.send(None)
        for member in self.members:
            member.join(10)


def _serve(rank: int, ranks: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which also fills uninitialised memory with NaN
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    while (task := pipe.recv()) is not None:
        function, args = task
        torch.manual_seed(1234)
        try:
            function(*args)
            dist.barrier()
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
    sys.stdout.flush()
    # without the interpreter's shutdown, where torch's own threads now and then abort
    os._exit(0)
