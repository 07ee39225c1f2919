"""Runs the Gluon form of the forward kernel without a GPU: its own source, over stand-ins for what
Gluon adds to Triton, whose other half Triton's interpreter does.

Warps are threads of which one runs at a time, and which one comes next is drawn at every barrier. A
copy lands at some time after it was started; a product reads its operands when it is waited for. So
a stage that is given back too early, or read too early, shows as NaN or as a wrong result, and a
barrier that nobody completes is an error. Registers, layouts and memory fences are not modelled.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import random
import threading
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from flashmark.kernels.block_sparse import configs
from flashmark.kernels.block_sparse.arguments import LaunchSizes


class Crew:
    """Warps that take turns, and the copies under way."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.waiting = {}  # thread -> what it waits for
        self.copies = []
        self.turns = {}
        self.failure = None

    def run(self, tasks) -> None:
        done = threading.Event()
        threads = [threading.Thread(target=self._live, args=(task, done)) for task in tasks]
        for thread in threads:
            self.turns[thread] = threading.Event()
            self.waiting[thread] = lambda: True
            thread.start()
        self._next(done)
        done.wait()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pause(self, ready=lambda: True) -> None:
        """Let others go on, until `ready`."""
        me = threading.current_thread()
        if me not in self.turns:  # before the warps part
            while not ready():
                self._land()
            return
        self.waiting[me] = ready
        self._next(self.done)
        self.turns[me].wait()
        self.turns[me].clear()
        if self.failure is not None:
            raise self.failure

    def _live(self, task, done: threading.Event) -> None:
        me = threading.current_thread()
        self.turns[me].wait()
        self.turns[me].clear()
        try:
            if self.failure is None:
                function, arguments = task
                function(*arguments)
        except Exception as failure:
            self.failure = self.failure or failure
        del self.waiting[me]
        self._next(done)

    def _next(self, done: threading.Event) -> None:
        self.done = done
        if not self.waiting:
            return done.set()
        while self.copies and self.draw.random() < 0.3:
            self._land()
        able = [t for t, ready in self.waiting.items() if self.failure is not None or ready()]
        while not able and self.copies:
            self._land()
            able = [t for t, ready in self.waiting.items() if ready()]
        if not able:
            self.failure = RuntimeError("deadlock: every warp waits for a barrier")
            able = list(self.waiting)
        self.turns[self.draw.choice(able)].set()

    def _land(self) -> None:
        self.copies.pop(self.draw.randrange(len(self.copies)))()


class Barrier:
    """An mbarrier: completes when `count` have arrived and all bytes have."""

    def __init__(self):
        self.completions = self.arrived = self.bytes = 0

    def settle(self) -> None:
        if self.arrived == self.count and self.bytes == 0:
            self.completions, self.arrived = self.completions + 1, 0

    def arrive(self, count: int = 1) -> None:
        self.arrived += count
        assert self.arrived <= self.count, "more arrivals than a barrier counts"
        self.settle()


class Stage:
    """A tile in shared memory, seen as it lies or transposed."""

    def __init__(self, dtype, shape):
        self.dtype = dtype
        empty = float("nan") if dtype.is_floating() else -1
        self.tile = tl.full(shape[-2:], empty, tl.float32).to(dtype)

    def reshape(self, shape):
        assert list(shape) == list(self.tile.shape)
        return View(self, False)


class Integer:
    """An integer in shared memory."""

    tile = None

    def store(self, tile):
        self.tile = tile

    def load(self, layout):
        return self.tile


class View:
    """A tile in shared memory, or some of its rows."""

    def __init__(self, stage: Stage, turned: bool, rows: slice = slice(None)):
        self.stage, self.turned, self.dtype, self.rows = stage, turned, stage.dtype, rows

    def permute(self, order):
        assert order == (1, 0)
        return View(self.stage, not self.turned)

    def slice(self, start, length):
        return View(self.stage, False, slice(start, start + length))

    def read(self):
        return tl.trans(self.stage.tile) if self.turned else self.stage.tile

    def load(self, layout):
        data = self.stage.tile.handle.data[self.rows].copy()
        handle = TensorHandle(data, self.stage.tile.handle.dtype)
        return tl.tensor(handle, tl.block_type(self.dtype, list(data.shape)))

    def store(self, tile):
        tile = tile.to(self.dtype)
        self.stage.tile.handle.data[self.rows] = tile.handle.data


class Product:
    """A matrix product in flight."""

    def __init__(self, a, b, acc, use_acc: bool):
        self.a, self.b, self.acc, self.type = a, b, acc if use_acc else None, acc.type

    def result(self):
        a = self.a.read() if isinstance(self.a, View) else self.a
        product = tl.dot(a, self.b.read())
        return product if self.acc is None else self.acc + product


class Descriptor:
    """Emulation of a host's TensorDescriptor inside a kernel."""

    def __init__(self, host, ptr):
        self.shape, self.strides, self.block_shape = host.shape, host.strides, host.block_shape
        self.layout, self.ptr, self.dtype = host.layout, ptr, ptr.dtype.element_ty
        rows, width = self.block_shape[2:]
        self.block_type = SimpleNamespace(nbytes=rows * width * self.dtype.primitive_bitwidth // 8)

    def load(self, *coordinates):
        ptrs, inside = self.block(*coordinates)
        return tl.load(ptrs, mask=inside, other=0.0)

    def store(self, tile, *coordinates):
        ptrs, inside = self.block(*coordinates)
        tl.store(ptrs, tile, mask=inside)

    def block(self, b, h, start, column):
        """Pointers of a block, and where it lies in the tensor."""
        rows, width = self.block_shape[2:]
        offs, offs_d = start + tl.arange(0, rows), column + tl.arange(0, width)
        head = self.ptr + int(b) * self.strides[0] + int(h) * self.strides[1]
        inside = (offs >= 0) & (offs < self.shape[2])
        ptrs = head + offs[:, None] * self.strides[2] + offs_d[None, :]
        return ptrs, inside[:, None] & (offs_d < self.shape[3])[None, :]


class Gluon:
    """`gl`: its own names, and those that it takes from Triton."""

    def __init__(self, crew: Crew):
        self.crew = crew

    def __getattr__(self, name):
        return getattr(tl, name)

    def arange(self, start, end, layout):
        return tl.arange(start, end)

    def full(self, shape, value, dtype, layout):
        return tl.zeros(shape, dtype) + value

    def convert_layout(self, tensor, layout):
        return tensor

    def static_range(self, *bounds):
        return range(*bounds)

    def allocate_shared_memory(self, dtype, shape, layout):
        special = {"barrier": Barrier, "integer": Integer}
        make = special.get(layout, lambda: Stage(dtype, shape))
        stages = [make() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: stages[int(i)])

    def warp_specialize(self, tasks, warps, registers):
        assert len(warps) == len(registers) == len(tasks) - 1
        self.crew.run(tasks)

    def SliceLayout(self, *_):  # noqa: N802
        return None

    def SwizzledSharedLayout(self, *_):  # noqa: N802
        return "integer"

    DotOperandLayout = NVMMADistributedLayout = BlockedLayout = lambda self, *_, **__: None
    DistributedLinearLayout = DotOperandLayout
    num_warps = lambda self: 4  # noqa: E731


def stand_ins(crew: Crew) -> dict:
    """By the name that the module of the kernel knows them under."""

    def wait(barrier, parity):
        crew.pause(lambda: barrier.completions % 2 != int(parity))

    def arrive(barrier, count):
        barrier.arrive(count)
        crew.pause()

    def expect(barrier, nbytes):
        barrier.bytes += nbytes
        barrier.arrive()

    def copy(desc, coordinates, barrier, stage):
        def land():
            stage.tile = desc.load(*coordinates)
            barrier.bytes -= desc.block_type.nbytes
            barrier.settle()

        crew.copies.append(land)

    stores: collections.Counter[threading.Thread] = collections.Counter()

    def store(desc, coordinates, stage):
        me = threading.current_thread()

        def land():
            desc.store(stage.tile, *coordinates)
            stores[me] -= 1

        stores[me] += 1
        crew.copies.append(land)

    def store_wait(outstanding):
        me = threading.current_thread()
        crew.pause(lambda: stores[me] <= outstanding)

    def finish(outstanding, values):
        crew.pause()
        return _one_or_all([v.result() if isinstance(v, Product) else v for v in values])

    return {
        "gl": Gluon(crew),
        "ROWS": 64,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=lambda barrier, count: setattr(barrier, "count", count),
            wait=wait,
            arrive=arrive,
            expect=expect,
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=copy,
            async_copy_shared_to_global=store,
            store_wait=store_wait,
        ),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product(a, b, acc, use_acc),
        "warpgroup_mma_wait": finish,
    }


def _one_or_all(values: list):
    return values[0] if len(values) == 1 else tuple(values)


@triton.jit
def program(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    residual_ptr,
    lists,
    modifiers,
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
    run((q_ptr, k_ptr, v_ptr, out_ptr), lse_ptr, residual_ptr, lists, modifiers, sizes)


MODULES = ("forward_gluon", "gluon_keep", "gluon_loads", "gluon_tile")


@contextlib.contextmanager
def emulated(seed: int = 0):
    """The Gluon form runs on CPU tensors."""
    from triton.experimental.gluon._runtime import GluonJITFunction

    package = configs.__package__
    modules = [importlib.import_module(f"{package}.{name}") for name in MODULES]
    kernel = modules[0].forward_gluon_kernel.fn
    functions = {
        name: f.fn
        for module in modules
        for name, f in vars(module).items()
        if isinstance(f, GluonJITFunction)
    }
    seeds = random.Random(seed)

    class Kernel:
        def __getitem__(self, grid):
            def launch(q, k, v, out, lse, residual, lists, modifiers, *sizes, F, STAGES, **options):
                hosts = (q, k, v, out)

                def run(ptrs, lse_ptr, residual_ptr, lists, modifiers, sizes):
                    crew = Crew(seeds.random())
                    descs = [Descriptor(*pair) for pair in zip(hosts, ptrs, strict=True)]
                    with pytest.MonkeyPatch.context() as patch:
                        for name, stand_in in (functions | stand_ins(crew)).items():
                            for module in modules:
                                if hasattr(module, name):
                                    patch.setattr(module, name, stand_in)
                        patch.setattr(tl.block_type, "layout", None, raising=False)
                        kernel(
                            *descs, lse_ptr, residual_ptr, lists, modifiers, *sizes, F, STAGES
                        )  # fmt: skip
                        assert not crew.copies, "a copy is under way when the program ends"

                bases = [host.base for host in hosts]
                program[grid](
                    *bases, lse, residual, lists, modifiers, *LaunchSizes(*sizes), run=run
                )  # fmt: skip

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules[0], "forward_gluon_kernel", Kernel())
        patch.setattr(configs, "device_arch", lambda device: 90)
        yield
