"""The gradient of a bias in the Gluon kernel of dK and dV: `add_bias_gradient` of bias.py, with the
layouts that Gluon wants to be told.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bias import add_entries
from .gluon_loads import ROWS


@gluon.jit
def add_diagonals(ds_t, base, first_key, start, gradient, sizes, F: gl.constexpr):
    """Sum ds^T [ROWS, BLOCK_M] along its diagonals j - i, the entries of a relative bias.

    Turning row n by n takes (n, m) to column (n - m) mod BLOCK_M, where two threads hold half of
    the rows each; a column holds two diagonals, and each is a range of rows.
    """
    layout: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [2, 2], [1, 0])
    n = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    c = gl.arange(0, F.BLOCK_M, gl.SliceLayout(0, layout))[None, :]
    # [ROWS, BLOCK_M]
    # `start`, a whole number of tiles, keeps 32 addresses from living through the loop
    turned = gl.gather(ds_t, (n - c + start) & (F.BLOCK_M - 1), 1)
    # [2, 32, BLOCK_M]
    halves = gl.reshape(turned, [2, 32, F.BLOCK_M])
    above = gl.reshape(gl.where(n >= c, turned, 0.0), [2, 32, F.BLOCK_M])
    # [2, BLOCK_M]
    later = gl.sum(above, 1)
    earlier = gl.sum(halves, 1) - later
    column = gl.arange(0, F.BLOCK_M, gl.SliceLayout(0, later.type.layout))[None, :]
    entry = first_key - start + column + gl.full(later.shape, 0, gl.int32, later.type.layout)
    entry += sizes.rows - 1
    last = sizes.rows + sizes.kv_len - 1
    add_entries(base + entry, later, (entry >= 0) & (entry < last), gradient, F)
    entry -= F.BLOCK_M
    add_entries(base + entry, earlier, (entry >= 0) & (entry < last), gradient, F)


@gluon.jit
def add_elements(ds_t, base, n2, i2, gradient, sizes, F: gl.constexpr):
    """Add ds^T [ROWS, BLOCK_M] to a dense bias, summed first over a dimension that the bias does
    not have.
    """
    has_i, has_n = (i2 >= 0) & (i2 < sizes.q_len), n2 < sizes.kv_len
    to_i = i2.to(gl.int64) * gradient.strides[2]
    to_n = n2.to(gl.int64) * gradient.strides[3]
    if F.BIAS_Q and F.BIAS_K:
        add_entries(base + (to_n + to_i), ds_t, has_n & has_i, gradient, F)
    elif F.BIAS_Q:
        add_entries(base + to_i, gl.sum(ds_t, 0)[None, :], has_i, gradient, F)
    elif F.BIAS_K:
        add_entries(base + to_n, gl.sum(ds_t, 1)[:, None], has_n, gradient, F)
    else:
        add_entries(base, gl.sum(gl.sum(ds_t, 1), 0), None, gradient, F)


@gluon.jit
def add_bias_gradient(
    ds_t, b, h, first_key, n2, start, m, offset, gradient, sizes, F: gl.constexpr
):
    """Add the gradient of a tile's logits to that of the bias."""
    base = gradient.total + gl.cast(b, gl.int64) * gradient.strides[0]
    base += gl.cast(h, gl.int64) * gradient.strides[1]
    if F.BIAS == "relative":
        add_diagonals(ds_t, base, first_key, start, gradient, sizes, F)
    else:
        add_elements(ds_t, base, n2, start - offset + m, gradient, sizes, F)
