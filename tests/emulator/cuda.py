"""The CUDA sources of csrc, compiled to PTX by nvcc, launched as their host code does."""

from __future__ import annotations

import functools
import re
import struct
import time

import torch

from .device import Done, extent
from .machine import Options, launch
from .nvcc import ptx
from .parser import parse
from .program import Program

THREADS = 256
WARPS = THREADS // 32
launched: list[Done] = []


@functools.cache
def programs(text: str) -> dict[str, Program]:
    """Kernels by their own names, `tied_kernel<df>` for templates."""
    found = {}
    for mangled, kernel in parse(text).items():
        name = re.search(r"\d([a-z_]+_kernel)(?:I([a-z]*)E)?E", mangled)
        found[name[1] + (f"<{name[2]}>" if name[2] else "")] = Program(kernel)
    return found


class Source:
    """The kernels of a source file."""

    def __init__(self, source: str, options: Options | None = None, edit=lambda text: text):
        self.options = options
        self.kernels = programs(edit(ptx(source)))

    def launch(self, name: str, grid, *arguments, shared: int = 0) -> None:
        """Arguments: tensors, bytes of a struct, or numbers. Structs hold addresses, so their
        tensors are listed as well: (bytes, [tensors]).
        """
        program = self.kernels[name]
        space, ranges = bytearray(program.param_bytes), []
        for param, value in zip(program.kernel.params, arguments, strict=True):
            if isinstance(value, tuple):
                value, tensors = value
                ranges += [extent(t) for t in tensors]
            elif isinstance(value, torch.Tensor):
                ranges.append(extent(value))
                value = struct.pack("<Q", value.data_ptr())
            elif value is None:
                value = bytes(8)
            elif not isinstance(value, bytes):
                form = {"f64": "d", "f32": "f"}.get(param.type) or {1: "b", 4: "i", 8: "q"}[
                    param.size
                ]
                value = struct.pack(f"<{form}", value)
            start = program.param_offsets[param.name]
            assert len(value) == param.size, (param, len(value))
            space[start : start + len(value)] = value
        grid = (*grid, 1, 1)[:3] if isinstance(grid, tuple) else (grid, 1, 1)
        start = time.perf_counter()
        done = launch(program, grid, THREADS, bytes(space), ranges, shared, self.options)
        seconds, counted = time.perf_counter() - start, (done.counts, done.conflicts, done.noted)
        launched.append(Done(name.partition("<")[0], seconds, program, grid, *counted))


def struct_of(form: str, *values) -> tuple[bytes, list[torch.Tensor]]:
    """A C struct: P is a tensor's address; alignment as a compiler gives it."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    plain = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
    return struct.pack("@" + form.replace("P", "Q"), *plain), tensors


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pack_dense(visible, block_q: int, block_kv: int, options=None):
    """`pack_dense_cuda`"""
    batch, heads, q_len, kv_len = visible.shape
    lines, blocks = ceil_div(q_len, block_q), ceil_div(kv_len, block_kv)
    words = ceil_div(block_kv, 32)
    tiles = batch * heads * lines * blocks
    bits = torch.full((tiles, block_q, words), -7, dtype=torch.int32)
    counts = torch.full((tiles,), -7, dtype=torch.int64)
    elements = struct_of("P9q3i4x", visible, *visible.stride(), heads, q_len, kv_len, lines, blocks,
                         block_q, block_kv, words)  # fmt: skip
    Source("tiles/pack_cuda.cu", options).launch("pack_kernel", tiles, elements, bits, counts)
    return bits, counts


def distinct_tiles(bits, counts, area: int, max_tiles: int, options=None):
    """`distinct_tiles_cuda`"""
    n, words = bits.shape[0], bits.shape[1] * bits.shape[2]
    buckets = 1
    while buckets < 2 * n + 1:
        buckets *= 2
    hashes = torch.full((n,), -7, dtype=torch.int64)
    table = torch.full((buckets,), -1, dtype=torch.int32)
    lowest = torch.full((buckets,), 0x7F7F7F7F, dtype=torch.int32)
    bucket_of, rank_of = (torch.full((n,), -7, dtype=torch.int32) for _ in range(2))
    classes = torch.full((n,), -7, dtype=torch.int32)
    tile_bits = torch.zeros(max_tiles, *bits.shape[1:], dtype=torch.int32)
    visible, found = torch.zeros(max_tiles, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tiles = struct_of("PP5qPPPPP", bits, counts, n, words, area, buckets, max_tiles, hashes, table,
                      lowest, bucket_of, rank_of)  # fmt: skip
    source, warps = Source("tiles/distinct_cuda.cu", options), ceil_div(n, WARPS)
    source.launch("hash_kernel", warps, tiles)
    source.launch("insert_kernel", warps, tiles)
    source.launch("rank_kernel", 1, tiles, found)
    source.launch("gather_kernel", warps, tiles, classes, tile_bits, visible)
    return classes, tile_bits, visible, found


def tile_lists(visible, classes, area, capacity: int, options=None, edit=lambda text: text):
    """`tile_lists_cuda`"""
    batch, heads, lines, blocks = visible.shape
    size = visible.numel()
    rows, cols = (torch.full((size,), -7, dtype=torch.int32) for _ in range(2))
    totals = torch.zeros(2, dtype=torch.int64)
    source = Source("tiles/lists_cuda.cu", options, edit)
    grid = struct_of("PPP12q", visible, classes, area, *visible.stride(), *classes.stride(), heads,
                     lines, blocks, size)  # fmt: skip
    source.launch("combine_kernel", ceil_div(size, THREADS), grid, rows, cols, totals)
    result = []
    for tiles, along, across in ((rows, lines, blocks), (cols, blocks, lines)):
        total = batch * heads * along
        ints = lambda *shape: torch.full(shape, -7, dtype=torch.int32)  # noqa: E731
        run_offsets, partial_offsets = ints(total + 1), ints(total + 1)
        runs, partials = torch.zeros(2, capacity, 2, dtype=torch.int32)
        counts, order = ints(batch, heads, along), ints(batch, heads, along)
        lists = struct_of("P4qPPPPPP", tiles, total, along, across, capacity, run_offsets, runs,
                          partial_offsets, partials, counts, order)  # fmt: skip
        warps = ceil_div(total, WARPS)
        source.launch("count_kernel", warps, lists)
        source.launch("scan_kernel", 2, lists)
        source.launch("fill_kernel", warps, lists)
        source.launch("order_kernel", (ceil_div(along, THREADS), batch * heads), lists)
        result.append([run_offsets, runs, partial_offsets, partials, counts, order])
    return (*result, totals[0], totals[1])


TYPES = {torch.float32: "f", torch.float64: "d"}


class Core:
    """The kernels of landmark_core, with their matrices in shared memory or in a workspace."""

    def __init__(self, outer: torch.dtype, inner: torch.dtype, in_shared: bool, options=None):
        self.source = Source("landmark_core/landmark_core_cuda.cu", options)
        self.outer, self.inner, self.in_shared = outer, inner, in_shared
        self.types = TYPES[inner] + TYPES[outer]

    def _launch(self, name: str, heads: int, m: int, *arguments) -> None:
        size = torch.finfo(self.inner).bits // 8
        vectors, elements = 6 * 256 * size, 3 * m * m
        space = (
            None
            if self.in_shared
            else torch.full((heads * elements,), float("nan"), dtype=self.inner)
        )
        shared = vectors + (elements * size if self.in_shared else 0)
        self.source.launch(f"{name}_kernel<{self.types}>", heads, *arguments, space, shared=shared)

    def forward(self, name: str, matrix, jitter: float, flag: bool):
        heads, m, _ = matrix.shape
        core = torch.full_like(matrix, float("nan"))
        inverse = core.to(self.inner).clone()
        used = torch.full((heads,), float("nan"), dtype=torch.float64)
        self._launch(name, heads, m, matrix, m, jitter, flag, core, inverse, used)
        return core, inverse, used

    def from_landmarks(self, X, scale: float, jitter: float, flag: bool, saving: bool):
        heads, m, dim = X.shape
        core = torch.full((heads, m, m), float("nan"), dtype=self.outer)
        inverse = core.to(self.inner).clone() if saving else None
        used = torch.full((heads,), float("nan"), dtype=torch.float64) if saving else None
        self._launch("landmarks", heads, m, X, m, dim, scale, jitter, flag, core, inverse, used)
        return core, inverse, used

    def landmarks_backward(self, X, inverse, used, dcore, scale: float, flag: bool):
        heads, m, dim = X.shape
        dX = torch.full_like(X, float("nan"))
        self._launch("landmarks_backward", heads, m, X, inverse, used, dcore, m, dim, scale, flag,
                     dX)  # fmt: skip
        return dX

    def tied_backward(self, scores, inverse, used, dcore, flag: bool):
        heads, m, _ = scores.shape
        result = torch.full_like(scores, float("nan"))
        self._launch("tied_backward", heads, m, scores, inverse, used, dcore, m, flag, result)
        return result

    def tikhonov_backward(self, matrix, inverse, dcore, flag: bool):
        heads, m, _ = matrix.shape
        result = torch.full_like(matrix, float("nan"))
        self._launch("tikhonov_backward", heads, m, matrix, inverse, dcore, m, flag, result)
        return result
