"""Runs the Gluon backward kernels without a GPU, as gluon_emulation runs the forward."""

from __future__ import annotations

import contextlib
import random
import sys
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl

from flashmark.kernels.block_sparse import configs
from flashmark.kernels.block_sparse.arguments import LaunchSizes
from tests.interpreter import gluon_emulation
from tests.interpreter.gluon_emulation import Crew, Descriptor, Stage


class Buffer(Stage):
    """A small tile in shared memory that is read, and maybe written, by itself."""

    def __init__(self, dtype, shape):
        nothing = float("nan") if dtype.is_floating() else -2
        self.dtype, self.tile = dtype, tl.full(shape, nothing, dtype)

    def load(self, layout):
        return self.tile

    def store(self, tile):
        self.tile = tile


class Rows(Descriptor):
    """A descriptor of vectors over the queries."""

    def __init__(self, host, ptr):
        self.shape, self.strides, self.block_shape = host.shape, host.strides, host.block_shape
        self.layout, self.ptr, self.dtype = host.layout, ptr, ptr.dtype.element_ty
        self.block_type = SimpleNamespace(nbytes=4 * self.block_shape[1])

    def load(self, pair, start):
        offs = start + tl.arange(0, self.block_shape[1])[None, :]
        inside = (offs >= 0) & (offs < self.shape[1])
        return tl.load(self.ptr + int(pair) * self.strides[0] + offs, mask=inside, other=0.0)


class Gluon(gluon_emulation.Gluon):
    """`gl`, with buffers that the forward does not have."""

    def allocate_shared_memory(self, dtype, shape, layout):
        if layout == "barrier" or len(shape) > 3:
            return super().allocate_shared_memory(dtype, shape, layout)
        stages = [Buffer(dtype, shape[1:]) for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: stages[int(i)])

    BlockedLayout = SwizzledSharedLayout = num_warps = lambda self, *_, **__: None


@triton.jit
def program(
    tensors,
    outputs,
    lists,
    modifiers,
    scale,
    pairs,
    heads,
    group,
    q_len,
    kv_len,
    rows,
    line_batch,
    line_head,
    tiles,
    section,
    run: tl.constexpr,
):
    sizes = (pairs, heads, group, q_len, kv_len, rows, line_batch, line_head, tiles, section)
    run(tensors, outputs, lists, modifiers, scale, sizes)


def _launcher(module, name: str, seeds: random.Random):
    """Stand-in for the kernel of a module."""
    from triton.experimental.gluon._runtime import GluonJITFunction

    kernel = getattr(module, name).fn
    users, functions = [module], []  # modules whose code runs, and what they know by a name
    for user in users:
        own = [(n, f) for n, f in vars(user).items() if isinstance(f, GluonJITFunction)]
        functions += [(user, n, f.fn) for n, f in own]
        users += {sys.modules[f.__module__] for _, f in own} - set(users)
    names = LaunchSizes._fields

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, F, STAGES, **options):
                *tensors, lists, modifiers, scale = arguments[: -len(names)]
                sizes = LaunchSizes(*arguments[-len(names) :])
                hosts = [x for x in tensors if hasattr(x, "base")]

                def run(ptrs, outputs, lists, modifiers, scale, sizes):
                    crew = Crew(seeds.random())
                    descs = [
                        (Rows if len(host.shape) == 2 else Descriptor)(host, ptr)
                        for host, ptr in zip(hosts, ptrs, strict=True)
                    ]
                    pieces = gluon_emulation.stand_ins(crew) | {"gl": Gluon(crew)}
                    with pytest.MonkeyPatch.context() as patch:
                        for user, name, function in functions:
                            patch.setattr(user, name, function)
                        for name, piece in pieces.items():
                            for user in users:
                                patch.setattr(user, name, piece, raising=False)
                        patch.setattr(tl.block_type, "layout", None, raising=False)
                        kernel(*descs, *outputs, lists, modifiers, scale, *sizes, F, STAGES)
                        assert not crew.copies, "a copy is under way when the program ends"

                bases = tuple(x.base for x in hosts)
                outputs = tuple(x for x in tensors if not hasattr(x, "base"))
                program[grid](bases, outputs, lists, modifiers, scale, *sizes, run=run)

            return launch

    return Kernel()


@contextlib.contextmanager
def emulated(seed: int = 0):
    """The Gluon form of the backward kernels runs on CPU tensors."""
    from flashmark.kernels.block_sparse import backward_gluon as launcher
    from flashmark.kernels.block_sparse import backward_gluon_kv, backward_gluon_q

    seeds = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (backward_gluon_kv, "backward_kv_gluon_kernel"),
            (backward_gluon_q, "backward_q_gluon_kernel"),
        ):
            patch.setattr(launcher, name, _launcher(module, name, seeds))
        patch.setattr(configs, "device_arch", lambda device: 90)
        yield
