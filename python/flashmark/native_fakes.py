"""Shapes of what the operators of `flashmark.native` return, without data: for `torch.compile`,
`torch.export` and fake tensors.
"""

from __future__ import annotations

import functools

import torch

_FAKES = torch.library.Library("flashmark_native", "FRAGMENT")


def register() -> None:
    """Register the shapes of all operators. The library is loaded by then."""
    fake = functools.partial(torch.library.register_fake, lib=_FAKES)

    @fake("flashmark_native::pack_tiles")
    def _(elements):
        n, block_q, block_kv = elements.shape
        bits = elements.new_empty((n, block_q, -(-block_kv // 32)), dtype=torch.int32)
        return bits, elements.new_empty((n,), dtype=torch.int64)

    @fake("flashmark_native::pack_dense")
    def _(visible, block_q, block_kv):
        batch, heads, q_len, kv_len = visible.shape
        n = batch * heads * -(-q_len // block_q) * -(-kv_len // block_kv)
        bits = visible.new_empty((n, block_q, -(-block_kv // 32)), dtype=torch.int32)
        return bits, visible.new_empty((n,), dtype=torch.int64)

    @fake("flashmark_native::distinct_tiles")
    def _(bits, counts, area, max_tiles):
        rows = torch.library.get_ctx().new_dynamic_size() if max_tiles < 0 else max_tiles
        classes = bits.new_empty(bits.shape[:1])
        tile_bits, visible = bits.new_empty((rows, *bits.shape[1:])), counts.new_empty((rows,))
        return classes, tile_bits, visible, counts.new_empty((1,))

    @fake("flashmark_native::tile_lists")
    def _(visible, classes, area, capacity):
        batch, heads, q_blocks, kv_blocks = visible.shape
        lists = []
        for lines in (q_blocks, kv_blocks):
            for _ in range(2):
                size = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
                total = batch * heads * lines
                lists += [classes.new_empty((total + 1,)), classes.new_empty((size, 2))]
            lists += [classes.new_empty((batch, heads, lines)) for _ in range(2)]
        return [*lists, area.new_empty(()), area.new_empty(())]

    def solved(matrix, jitter, flag, wide):
        inner = torch.float64 if wide else matrix.dtype
        inverse = matrix.new_empty(matrix.shape, dtype=inner)
        used = matrix.new_empty(matrix.shape[:1], dtype=torch.float64)
        return matrix.new_empty(matrix.shape), inverse, used

    fake("flashmark_native::tied_core")(solved)
    fake("flashmark_native::tikhonov_core")(solved)

    @fake("flashmark_native::landmarks_core")
    def _(landmarks, scale, jitter, softmax):
        return landmarks.new_empty((*landmarks.shape[:-1], landmarks.shape[-2]))

    @fake("flashmark_native::landmarks_core_saving")
    def _(landmarks, scale, jitter, softmax):
        core = landmarks.new_empty((*landmarks.shape[:-1], landmarks.shape[-2]))
        used = core.new_empty((core.shape[:-2].numel(),), dtype=torch.float64)
        return core, core.new_empty(core.shape, dtype=torch.float64), used

    @fake("flashmark_native::landmarks_core_backward")
    def _(landmarks, inverse, used, dcore, scale, softmax):
        return landmarks.new_empty(landmarks.shape)

    @fake("flashmark_native::tied_core_backward")
    def _(scores, inverse, used, dcore, softmax):
        return scores.new_empty(scores.shape)

    @fake("flashmark_native::tikhonov_core_backward")
    def _(matrix, inverse, dcore, unit_rows):
        return matrix.new_empty(matrix.shape)
