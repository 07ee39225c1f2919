"""A bias and its gradient in the Gluon kernels of the backward pass.

The entries of a relative bias lie along the diagonals of a tile. Of a product [ROWS, N], lane l of
a warp has the rows g and g + 8 and, of each eight columns, 2t and 2t + 1, where g = l // 4 and
t = l % 4: entry 8 (k - a) + (2t + b - g) - 16 warp, counted from the tile's corner. So it has
entries of N / 4 + 2 diagonals, not of N / 2. They are loaded once, and what goes to one is summed
in the thread before lanes exchange anything.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bias import add_entries
from .gluon_loads import ROWS
from .primitives import bias_base

WARPS = gl.constexpr(4)
LANES = gl.constexpr(32)
BY_LANE = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))


@gluon.jit
def place(layout: gl.constexpr):
    """Numbers of warps [WARPS, 1] and of lanes [1, LANES]."""
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, layout))[:, None]
    return warp, gl.arange(0, LANES, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def join_all(parts, FIRST: gl.constexpr, SIZE: gl.constexpr):
    """SIZE tensors of a tuple, from FIRST on, [WARPS, LANES] each, as one [WARPS, LANES, SIZE]."""
    if SIZE == 2:
        joined = gl.join(parts[FIRST], parts[FIRST + 1])
    else:
        HALF: gl.constexpr = SIZE // 2
        one, other = join_all(parts, FIRST, HALF), join_all(parts, FIRST + HALF, HALF)
        joined = gl.reshape(gl.permute(gl.join(one, other), (0, 1, 3, 2)), [WARPS, LANES, SIZE])
    return joined


@gluon.jit
def split_all(x):
    """The inverse of `join_all`."""
    SIZE: gl.constexpr = x.shape[2]
    if SIZE == 2:
        parts = gl.split(x)
    else:
        halves = gl.permute(gl.reshape(x, [WARPS, LANES, 2, SIZE // 2]), (0, 1, 3, 2))
        one, other = gl.split(halves)
        parts = split_all(one) + split_all(other)
    return parts


@gluon.jit
def load_entry(ptr, inside, CHECK: gl.constexpr):
    """An entry of a bias in float32; if CHECK, 0 where it is not inside."""
    if CHECK:
        part = gl.load(ptr, mask=inside, other=0.0)
    else:
        part = gl.load(ptr)
    return part.to(gl.float32)


@gluon.jit
def tile_of(above, below, ABOVE: gl.constexpr, BELOW: gl.constexpr, tile):
    """A tile like another: of a tuple's entries from ABOVE on for the rows g, and from BELOW on for
    the rows g + 8, one for each 2k + b.
    """
    N: gl.constexpr = tile.shape[1]
    # [WARPS, LANES, N / 4, 2]
    pairs = gl.join(join_all(above, ABOVE, N // 4), join_all(below, BELOW, N // 4))
    # [WARPS, 2, 8, N / 8, 4, 2]
    parts = gl.permute(gl.reshape(pairs, [WARPS, 8, 4, N // 8, 2, 2]), (0, 5, 1, 3, 2, 4))
    return gl.convert_layout(gl.reshape(parts, [ROWS, N]), tile.type.layout)


@gluon.jit
def load_diagonals(ptr, first, last, tile, STEP: gl.constexpr, CHECK: gl.constexpr):
    """Relative bias of a tile, float32: entry first + STEP (column - row), 0 outside 0 .. last."""
    N: gl.constexpr = tile.shape[1]
    warp, lane = place(BY_LANE)
    # [WARPS, LANES]
    entry = first + STEP * (lane % 4 * 2 - lane // 4 - 16 * warp)
    ptrs = ptr + entry
    parts = ()
    for n in gl.static_range(N // 4 + 2):
        far = STEP * (n // 2 * 8 + n % 2 - 8)
        inside = (entry + far >= 0) & (entry + far < last)
        parts = parts + (load_entry(ptrs + far, inside, CHECK),)
    return tile_of(parts, parts, 2, 0, tile)


@gluon.jit
def load_elements(ptr, down, across, row0, rows, column0, columns, tile, CHECK: gl.constexpr):
    """Dense bias of a tile, float32, from `row0` and `column0` on, with steps `down` and `across`;
    0 outside 0 .. rows and 0 .. columns.
    """
    N: gl.constexpr = tile.shape[1]
    warp, lane = place(BY_LANE)
    # [WARPS, LANES]
    row, column = row0 + warp * 16 + lane // 4, column0 + lane % 4 * 2
    above_in, below_in = (row >= 0) & (row < rows), (row + 8 >= 0) & (row + 8 < rows)
    ptrs = ptr + (row.to(gl.int64) * down + column.to(gl.int64) * across)
    down, across = gl.cast(down, gl.int64), gl.cast(across, gl.int64)
    above, below = (), ()
    for n in gl.static_range(N // 4):
        inside = (column >= 0) & (column < columns)
        above = above + (load_entry(ptrs, above_in & inside, CHECK),)
        below = below + (load_entry(ptrs + down * 8, below_in & inside, CHECK),)
        if n % 2 == 0:
            column, ptrs = column + 1, ptrs + across
        else:
            column, ptrs = column + 7, ptrs + across * 7
    return tile_of(above, below, 0, 0, tile)


@gluon.jit
def load_vector(ptr, start, end, step, tile, AXIS: gl.constexpr):
    """Dense bias of a tile that varies along one axis, float32."""
    SIZE: gl.constexpr = tile.shape[AXIS]
    at = start + gl.arange(0, SIZE, gl.SliceLayout(1 - AXIS, tile.type.layout))
    inside = (at >= 0) & (at < end)
    vector = gl.load(ptr + at.to(gl.int64) * step, mask=inside, other=0.0)
    return gl.expand_dims(vector.to(gl.float32), 1 - AXIS)


@gluon.jit
def load_bias(
    s, b, h, row0, key0, offset, work, DOWN: gl.constexpr, CHECK: gl.constexpr, F: gl.constexpr
):
    """Bias of a tile of scores from mask row `row0` and key `key0` on, float32; with DOWN keys go
    down.
    """
    sizes, modifiers = work.sizes, work.modifiers
    ptr, steps = bias_base(modifiers, b, h, F), modifiers.bias_strides
    i = row0 - offset
    if F.BIAS == "relative":
        last = sizes.rows + sizes.kv_len - 1
        STEP: gl.constexpr = -1 if DOWN else 1
        bias = load_diagonals(ptr, key0 - row0 + (sizes.rows - 1), last, s, STEP, CHECK)
    elif F.BIAS_Q and F.BIAS_K and DOWN:
        bias = load_elements(
            ptr, steps[3], steps[2], key0, sizes.kv_len, i, sizes.q_len, s, CHECK
        )  # fmt: skip
    elif F.BIAS_Q and F.BIAS_K:
        bias = load_elements(
            ptr, steps[2], steps[3], i, sizes.q_len, key0, sizes.kv_len, s, CHECK
        )  # fmt: skip
    elif F.BIAS_Q:
        bias = load_vector(ptr, i, sizes.q_len, steps[2], s, 1 if DOWN else 0)
    elif F.BIAS_K:
        bias = load_vector(ptr, key0, sizes.kv_len, steps[3], s, 0 if DOWN else 1)
    else:
        bias = gl.load(ptr).to(gl.float32)
    return bias


@gluon.jit
def exchange(x, lane):
    """x [WARPS, LANES] of another lane."""
    index = gl.full(x.shape, 0, gl.int32, x.type.layout) + lane
    return gl.gather(x, index, 1)


@gluon.jit
def add_diagonals(ds, base, first, gradient, sizes, F: gl.constexpr):
    """Sum dS [ROWS, N] along its diagonals j - i, the entries of a relative bias; `first` is that
    of the corner.

    Entry 8m + (2t + b - g) mod 8 of a warp is summed over eight rows g in three exchanges: in each
    a lane gives half of its sums to the lane that has the same entries of other rows.
    """
    N: gl.constexpr = ds.shape[1]
    M: gl.constexpr = N // 8 + 2
    # [WARPS, 8, 4, N / 8, 2, 2]
    pairs = gl.permute(gl.reshape(ds, [WARPS, 2, 8, N // 8, 4, 2]), (0, 2, 4, 3, 5, 1))
    above, below = gl.split(gl.reshape(pairs, [WARPS, LANES, N // 4, 2]))
    above, below = split_all(above), split_all(below)
    layout: gl.constexpr = above[0].type.layout
    warp, lane = place(layout)
    g, t = lane // 4, lane % 4
    zero = gl.full([WARPS, LANES], 0.0, gl.float32, layout)

    # of m = -2, two sums each, to N / 8
    sums = (zero, zero, below[0], below[1])
    for n in gl.static_range(N // 4 - 2):
        sums = sums + (above[n] + below[n + 2],)
    sums = sums + (above[N // 4 - 2], above[N // 4 - 1], zero, zero)
    # so that 2t + b - g is taken mod 8
    moved = ()
    for n in gl.static_range(2 * M):
        moved = moved + (gl.where(2 * t + n % 2 < g, sums[n + 2], sums[n]),)
    # a lane keeps half of the m
    upper = g & 4 != 0
    halves = ()
    for n in gl.static_range(M):
        kept = gl.where(upper, moved[n + M], moved[n])
        halves = halves + (kept + exchange(gl.where(upper, moved[n], moved[n + M]), lane ^ 18),)
    # one b
    second = g & 2 != 0
    other = ((g ^ 2) * 4) + ((t + gl.where(second, 3, 1)) & 3)
    rest = ()
    for n in gl.static_range(M // 2):
        kept = gl.where(second, halves[2 * n + 1], halves[2 * n])
        rest = rest + (kept + exchange(gl.where(second, halves[2 * n], halves[2 * n + 1]), other),)
    # and half of the m again
    odd = g & 1 != 0
    other = ((g ^ 3) * 4) + ((t + gl.where(g & 3 == 0, 1, gl.where(g & 3 == 3, 3, 0))) & 3)
    HALF: gl.constexpr = (M // 2 + 1) // 2
    m = gl.where(upper, M // 2, 0) + gl.where(odd, HALF, 0) - 2
    entry = first + 8 * m + ((2 * t + (g >> 1 & 1) - g) & 7) - 16 * warp
    last = sizes.rows + sizes.kv_len - 1
    for n in gl.static_range(HALF):
        inside = (entry + 8 * n >= 0) & (entry + 8 * n < last)
        if n + HALF < M // 2:
            kept = gl.where(odd, rest[n + HALF], rest[n])
            total = kept + exchange(gl.where(odd, rest[n], rest[n + HALF]), other)
        else:
            total = rest[n] + exchange(rest[n], other)
            inside = inside & (odd == 0)
        add_entries(base + entry + 8 * n, total, inside, gradient, F)


@gluon.jit
def add_elements(ds, base, start_i, start_n, gradient, sizes, F: gl.constexpr):
    """Add dS [ROWS, BLOCK_N] to a dense bias, summed first over a dimension that the bias does not
    have.
    """
    to_i, to_n = gradient.strides[2], gradient.strides[3]
    # a vector in the layout of a product would be added by each register that has a copy
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if F.BIAS_Q and F.BIAS_K:
        layout: gl.constexpr = ds.type.layout
        # [ROWS, 1], [1, BLOCK_N]
        i2 = (start_i + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))[:, None]
        n2 = (start_n + gl.arange(0, F.BLOCK_N, gl.SliceLayout(0, layout)))[None, :]
        inside = (i2 >= 0) & (i2 < sizes.q_len) & (n2 < sizes.kv_len)
        entries = base + (i2.to(gl.int64) * to_i + n2.to(gl.int64) * to_n)
        add_entries(entries, ds, inside, gradient, F)
    elif F.BIAS_Q:
        i = start_i + gl.arange(0, ROWS, one)
        sums = gl.convert_layout(gl.sum(ds, 1), one)
        inside = (i >= 0) & (i < sizes.q_len)
        add_entries(base + i.to(gl.int64) * to_i, sums, inside, gradient, F)
    elif F.BIAS_K:
        n = start_n + gl.arange(0, F.BLOCK_N, one)
        sums = gl.convert_layout(gl.sum(ds, 0), one)
        add_entries(base + n.to(gl.int64) * to_n, sums, n < sizes.kv_len, gradient, F)
    else:
        add_entries(base, gl.sum(gl.sum(ds, 1), 0), None, gradient, F)


@gluon.jit
def add_bias_gradient(ds, b, h, row0, key0, offset, gradient, sizes, F: gl.constexpr):
    """Add the gradient dS [ROWS, BLOCK_N] of a tile's logits to that of the bias."""
    base = gradient.total + gl.cast(b, gl.int64) * gradient.strides[0]
    base += gl.cast(h, gl.int64) * gradient.strides[1]
    if F.BIAS == "relative":
        add_diagonals(ds, base, key0 - row0 + (sizes.rows - 1), gradient, sizes, F)
    else:
        add_elements(ds, base, row0 - offset, key0, gradient, sizes, F)
