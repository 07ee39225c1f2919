"""Triton's interpreter spends its time on bookkeeping, which this makes cheaper; the arithmetic is
untouched. Import once, after triton.

It patches the language, a search through its modules, whenever a kernel calls a helper: here a
launch does, once for all its helpers. It builds the shape of each tensor and the name of its type
anew, out of objects that never change: here once for each shape.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
# what kernels see of the language, and what its own helpers do
_SEEN = SimpleNamespace(__globals__={"tl": tl, "core": core})


def _call_helper(self, *args, **kwargs):
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter._patch_lang = lambda kernel: _patch_lang(_SEEN)
interpreter.InterpretedFunction.__call__ = _call_helper

_unwrap, _np_dtype, _equal = core._unwrap_if_constexpr, interpreter._get_np_dtype, core.dtype.__eq__
_NESTED = (list, tuple, core.tuple)


def _unwrap_if_constexpr(value):
    if isinstance(value, core.constexpr):
        return value.value
    return _unwrap(value) if isinstance(value, _NESTED) else value


@functools.cache
def _shape_of_tensor(shape: tuple[int, ...]) -> tuple:
    """A tensor's shape and number of elements: those of constants."""
    plain = core.tuple([core.constexpr(size) for size in shape])
    return plain, core.constexpr(functools.reduce(lambda a, b: a * b, shape, 1))


@functools.cache
def _of_block_type(shape: tuple[int, ...], element: str) -> tuple:
    """Shape, number of elements and name of a type, and its element's as its last."""
    if not shape:
        raise TypeError("0d block_type is forbidden")
    plain = core.tuple(list(shape))
    return plain, core.validate_block_shape(plain), f"<{plain}, {element}>"


def _init_block_type(self, element_ty, shape) -> None:
    sizes = tuple(map(_unwrap_if_constexpr, shape))
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _of_block_type(sizes, str(element_ty))


def _init_tensor(self, handle, type) -> None:
    shape = tuple(type.shape.values) if type.is_block() else ()
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape_of_tensor(shape)


@functools.cache
def _np_dtype_of(name: str, pointer: bool):
    return _np_dtype(core.pointer_type(core.int8) if pointer else core.dtype(name))


def _get_np_dtype(type):
    element = type.scalar
    return _np_dtype_of(element.name, isinstance(element, core.pointer_type))


def _same_type(self, other) -> bool:
    return self is other or _equal(self, other)


core._unwrap_if_constexpr = _unwrap_if_constexpr
core.block_type.__init__ = _init_block_type
core.block_type.__eq__ = lambda self, other: (
    isinstance(other, core.block_type) and self.name == other.name
)
core.tensor.__init__ = _init_tensor
core.dtype.__eq__ = _same_type
interpreter._get_np_dtype = _get_np_dtype
