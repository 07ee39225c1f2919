"""Checks of users' arguments; errors name the argument, the expected and the given."""

from __future__ import annotations

import numbers
import operator
import sys

import torch
from torch import Tensor

from flashmark.masks import BlockMask, Mask
from flashmark.masks.arguments import not_a_mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 256
LARGEST = sys.float_info.max
Landmarks = Tensor | tuple[Tensor, Tensor]  # tied, or (landmark queries, landmark keys)


def check_tensor(name: str, value, dims: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one: pack the sequences along one "
            "dimension (masks.documents, cu_seqlens), or pad them (kv_lengths, key_mask)"
        )
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(value.shape)}")


def check_same(
    name: str, value: Tensor, *, dtype: torch.dtype | None, device: torch.device
) -> None:
    """`dtype=None` allows every floating-point dtype."""
    if dtype is None and value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} like query, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like query, got {value.device}")


def one_or(got: int, want: int) -> bool:
    """Whether a size broadcasts. Not written with `in`, which finds traced sizes unequal."""
    return got == want or got == 1


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int]:
    """Check that query, key and value fit together; returns (B, Hq, Nq, D, Nk).

    Attributes are read once: on the host this is a good part of a small call's time.
    """
    check_tensor("query", query, 4)
    dtype, device, shapes = query.dtype, query.device, []
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != 4:
            check_tensor(name, x, 4)
        shape, own = x.shape, x.dtype
        if own not in DTYPES:
            allowed = "float16, bfloat16, float32 or float64"
            raise TypeError(f"{name}: expected {allowed}, got {own}")
        if own != dtype or x.device != device:
            check_same(name, x, dtype=dtype, device=device)
        if not 1 <= shape[3] <= MAX_DIM:
            raise ValueError(f"{name}: expected a head dimension of 1 to {MAX_DIM}, got {shape[3]}")
        shapes.append(shape)
    batch, heads, q_len, dim = shapes[0]
    kv_batch, kv_heads, kv_len, key_dim = shapes[1]
    value_batch, value_heads, value_len, _ = shapes[2]
    if kv_batch != batch:
        raise ValueError(f"key: expected a batch of {batch} like query, got {kv_batch}")
    if key_dim != dim:
        raise ValueError(f"key: expected a head dimension of {dim} like query, got {key_dim}")
    if heads == 0:
        raise ValueError("query: expected at least one head, got 0")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key: expected a number of heads that divides {heads}, got {kv_heads}")
    if value_batch != batch or value_heads != kv_heads or value_len != kv_len:
        raise ValueError(
            f"value: expected {(batch, kv_heads, kv_len)} in the first dimensions like key, "
            f"got {(value_batch, value_heads, value_len)}"
        )
    return batch, heads, q_len, dim, kv_len


def finite(name: str, value: float, *, positive: bool = False, negative: bool = True) -> float:
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymFloat)
    ):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not isinstance(value, int | float | torch.SymFloat):
        value = float(value)  # NumPy would compare in its own precision, and warn
    bound = " > 0" if positive else "" if negative else " >= 0"
    # comparisons, because torch.compile may trace the number as a symbol; False for NaN
    least = -LARGEST if negative and not positive else 0.0
    if not least <= value <= LARGEST or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return float(value)


def flag(name: str, value) -> bool:
    """A bool of Python, also where NumPy's came."""
    if isinstance(value, bool):
        return value
    kind = type(value)
    if kind.__module__ != "numpy" or not kind.__name__.startswith("bool"):
        raise TypeError(f"{name}: expected a bool, got {kind.__name__}")
    return bool(value)


def deterministic_or_default(deterministic) -> bool:
    """Whether gradients must repeat bitwise: torch's setting where the caller has none."""
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    return flag("deterministic", deterministic)


def check_count(name: str, value, least: int = 1, most: int | None = None) -> int:
    """An int of Python from `least` to `most`, also where NumPy's came."""
    if isinstance(value, bool) or not isinstance(value, int | numbers.Integral):
        raise TypeError(f"{name}: expected an int >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    # torch.compile may trace an int as a symbol, which must stay one
    count = value if isinstance(value, int) else operator.index(value)
    if most is not None and count > most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")
    return count


def check_kv_lengths(lengths, batch: int, kv_len: int, device: torch.device) -> Tensor | None:
    """int32 (batch,) from 0 to `kv_len`, or None. A greater length means every key."""
    lengths = _integers("kv_lengths", lengths, batch, device, scalar=False)
    return None if lengths is None else lengths.clamp(0, kv_len).to(torch.int32)


def check_query_offset(
    offset, batch: int, q_len: int, rows: int, device: torch.device
) -> Tensor | None:
    """int32 of 1 or `batch` entries that keep the queries inside the mask's rows, or None.

    The values of a tensor are checked on a CPU alone: on a GPU this would be a host sync, and under
    torch.compile a break. There they are clamped.
    """
    last = rows - q_len
    if isinstance(offset, numbers.Integral) and not isinstance(offset, bool):
        _check_offset_range(int(offset), int(offset), q_len, rows)
        return torch.full((1,), int(offset), dtype=torch.int32, device=device)
    offset = _integers("query_offset", offset, batch, device, scalar=True)
    if offset is None:
        return None
    if readable(offset) and offset.numel():
        values = offset.tolist()
        _check_offset_range(min(values), max(values), q_len, rows)
    if offset.dtype == torch.int64:
        offset = offset.clamp(0, max(0, last)).to(torch.int32)
    return offset


def _check_offset_range(low: int, high: int, q_len: int, rows: int) -> None:
    if low < 0 or high + q_len > rows:
        raise ValueError(
            f"query_offset: expected 0 to {rows - q_len} for {q_len} queries of {rows} rows, "
            f"got {low if low < 0 else high}"
        )


def readable(x: Tensor) -> bool:
    """Whether values may be read: without waiting for a GPU or breaking a graph or a transform."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def _integers(
    name: str, value: Tensor | None, batch: int, device: torch.device, *, scalar: bool
) -> Tensor | None:
    """An int32 or int64 tensor of `batch` entries (or 1 with `scalar`) on `device`, or None."""
    if value is None:
        return None
    expected = f"an int32 tensor of shape ({batch},)"
    if scalar:
        expected = f"an int, or {expected} or (1,)"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected {expected}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like query, got {value.device}")
    if value.dim() == 1:
        fits = value.shape[0] == batch or (scalar and value.shape[0] == 1)
    else:
        fits = scalar and value.dim() == 0
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(value.shape)}")
    return value if value.dim() == 1 else value.reshape(1)


def check_key_mask(key_mask, shape: tuple[int, int], device: torch.device) -> None:
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, 2)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected bool, got {key_mask.dtype}")
    if key_mask.device != device:
        raise ValueError(
            f"key_mask: expected a tensor on {device} like query, got {key_mask.device}"
        )
    if tuple(key_mask.shape) != shape:
        raise ValueError(f"key_mask: expected shape {shape}, got {tuple(key_mask.shape)}")


def check_block_mask(
    mask, batch: int, heads: int, rows: int, kv_len: int, device: torch.device
) -> None:
    if mask is None or isinstance(mask, Mask):
        return
    if not isinstance(mask, BlockMask):
        raise not_a_mask("mask", mask, "a mask expression, a BlockMask or None")
    expected = (f"1 or {batch}", f"1 or {heads}", rows, kv_len)
    fits = one_or(mask.batch, batch) and one_or(mask.heads, heads)
    if not fits or (mask.q_len, mask.kv_len) != (rows, kv_len):
        wanted = "(" + ", ".join(map(str, expected)) + ")"
        raise ValueError(f"mask: expected one compiled for {wanted}, got {mask.shape}")
    if mask.device != device:
        raise ValueError(f"mask: expected one on {device} like query, got {mask.device}")


def check_bias(bias, shape: tuple[int, int, int, int], rows: int, device: torch.device) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a tensor, got {type(bias).__name__}")
    check_same("bias", bias, dtype=None, device=device)
    relative = (shape[1], rows + shape[3] - 1)
    dense = bias.dim() == 4 and all(
        one_or(got, want) for got, want in zip(bias.shape, shape, strict=True)
    )
    if not dense and tuple(bias.shape) != relative:
        raise ValueError(
            f"bias: expected {relative} (relative) or 4-d broadcastable to {shape}, "
            f"got {tuple(bias.shape)}"
        )


def check_sinks(sinks, heads: int, device: torch.device) -> None:
    if sinks is None:
        return
    check_tensor("sinks", sinks, 1)
    check_same("sinks", sinks, dtype=None, device=device)
    if sinks.shape[0] != heads:
        raise ValueError(
            f"sinks: expected ({heads},), one per query head, got {tuple(sinks.shape)}"
        )
