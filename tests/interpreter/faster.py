"""Triton's interpreter patches the language, a search through its modules, whenever a kernel calls
a helper: half of the time. Here a launch does, once for all its helpers. Import once, after triton.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
# what kernels see of the language, and what its own helpers do
_SEEN = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _call_helper(self, *args, **kwargs):
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter._patch_lang = lambda kernel: _patch_lang(_SEEN)
interpreter.InterpretedFunction.__call__ = _call_helper
