"""Addresses: the memory of the process as arrays, and the windows of generic addresses."""

from __future__ import annotations

import ctypes

import numpy as np

FIRST = 4096  # no address of global memory below it
SHARED_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57  # generic addresses of shared memory, parameters


def _whole_memory(dtype: str) -> np.ndarray:
    """The process's memory as one array: read and written only after a check of the range."""
    size = np.dtype(dtype).itemsize
    kind = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}[size]
    count = ((1 << 47) - 2 * FIRST) // size
    return np.ctypeslib.as_array((kind * count).from_address(FIRST))


WHOLE = {size: _whole_memory(f"u{size}") for size in (1, 2, 4, 8)}
