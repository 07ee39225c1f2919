"""bfloat16 in Triton's interpreter, which computes on the bit patterns as if they were integers.
Import once, after triton.

Every operation is redone in float32 and rounded to nearest even. Reductions over bfloat16 are
refused: kernels reduce in float32.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from flashmark import dispatch

dispatch.INTERPRETED.add(torch.bfloat16)

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def is_bfloat16(value) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def as_float32(value):
    return Handle(widen(value.data), tl.float32) if is_bfloat16(value) else value


def _elementwise(name: str, operands: int) -> None:
    plain = getattr(Builder, name)

    def operation(self, *args, **kwargs):
        if not any(map(is_bfloat16, args[:operands])):
            return plain(self, *args, **kwargs)
        result = plain(self, *map(as_float32, args), **kwargs)
        if result.data.dtype == np.float32:
            return Handle(narrow(result.data), tl.bfloat16)
        return result

    setattr(Builder, name, operation)


for _name, _operands in (("binary_op", 2), ("unary_op", 1), ("ternary_op", 3)):
    _elementwise(_name, _operands)

_dot = Builder.create_dot
_cast = Builder.cast_impl
_convert = Builder.create_fp_to_fp


def dot(self, a, b, accumulator, *rest):
    if is_bfloat16(accumulator):
        raise NotImplementedError("a bfloat16 accumulator")
    return _dot(self, as_float32(a), as_float32(b), accumulator, *rest)


def cast(self, source, target):
    into = target.scalar == tl.bfloat16
    if is_bfloat16(source) and not into:
        wide = as_float32(source)
        return wide if target.scalar == tl.float32 else _cast(self, wide, target)
    if into and not is_bfloat16(source):
        return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, source, target)


def convert(self, source, target, rounding):
    types = {source.dtype.scalar, target.scalar}
    if tl.bfloat16 in types and types <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
        return self.cast_impl(source, target)
    return _convert(self, source, target, rounding)


Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = dot, cast, convert


def _refuse(owner) -> None:
    plain = owner.apply

    def apply(self, operands):
        each = operands if isinstance(operands, tuple) else (operands,)
        if any(isinstance(x, tl.tensor) and x.dtype.scalar == tl.bfloat16 for x in each):
            raise NotImplementedError("a reduction over bfloat16")
        return plain(self, operands)

    owner.apply = apply


_refuse(interpreter.ReduceOps)
_refuse(interpreter.ScanOps)

# triton 3.6 takes int() of a one-element array, which numpy 2.4 refuses
if "squeeze" not in inspect.getsource(interpreter._patch_lang_tensor):
    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *args):
        result = _patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return result

    interpreter._patch_lang_tensor = _patch_lang_tensor
