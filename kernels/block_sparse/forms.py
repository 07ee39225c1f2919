"""Choice between the forms of the forward kernel, and the conditions of Hopper's: for the launcher
and for the user's message.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, passes
from .arguments import KernelArguments

ALIGNMENT = 16  # bytes, of what a tensor descriptor points to and of its strides
MAX_DIM = 128
MIN_BLOCK = (64, 32)  # of a mask: rows of a warpgroup, bits of a word


def choose_forward(
    query: Tensor, key: Tensor, value: Tensor, call: KernelArguments
) -> configs.Config:
    """The config of the forward pass: one that is in use, or else the Hopper form's where it can
    compute the call, or the pointer form's.
    """
    free = configs.hopper_forms() and not configs.in_use("forward")
    if free and can_use_form("gluon", query, key, value, call):
        features = call.features
        block = (features.BLOCK_Q, features.BLOCK_KV) if features.KIND == "sparse" else None
        return configs.hopper(
            "gluon",
            max(features.PAD, features.PAD_V),
            block,
            features.BIAS != "none" or features.DROPOUT,
        )
    config = passes.choose_config("forward", query, call)
    can_use_form(config.form, query, key, value, call, raise_error=True)
    return config


def can_use_form(
    form: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: KernelArguments,
    *,
    raise_error: bool = False,
) -> bool:
    """Whether a form of the forward kernel, one of `configs.FORMS`, can compute a call.

    With `raise_error`, the obstacle is raised: ValueError where other operands would work,
    NotImplementedError where the form lacks a feature or does not run on the device.
    """
    objection = _objection(form, query, key, value, call)
    if objection is not None and raise_error:
        raise objection
    return objection is None


def _objection(
    form: str, query: Tensor, key: Tensor, value: Tensor, call: KernelArguments
) -> Exception | None:
    if form not in configs.FORMS:
        return ValueError(f"form: expected one of {', '.join(configs.FORMS)}, got {form!r}")
    if form == "pointers":
        return None
    arch = configs.device_arch(query.device)
    if arch != 90:
        return NotImplementedError(f"form {form!r}: expected compute capability 9.0, got {arch}")
    features = call.features
    block = features.BLOCK_Q, features.BLOCK_KV
    if features.KIND == "sparse" and (block[0] < MIN_BLOCK[0] or block[1] < MIN_BLOCK[1]):
        return ValueError(f"form {form!r}: expected blocks of at least {MIN_BLOCK}, got {block}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        complaint = _misfit(tensor)
        if complaint is not None:
            return ValueError(f"form {form!r}: {name}: {complaint}")
    if value.shape[-1] * value.element_size() % ALIGNMENT:  # rows of the output
        return ValueError(
            f"form {form!r}: value: expected rows of whole {ALIGNMENT} bytes, got "
            f"{value.shape[-1] * value.element_size()}"
        )
    return None


def _misfit(tensor: Tensor) -> str | None:
    """Reason why a descriptor cannot read a tensor (expected, got), or None."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16, got {tensor.dtype}"
    if tensor.shape[-1] > MAX_DIM:
        return f"expected a head dimension of at most {MAX_DIM}, got {tensor.shape[-1]}"
    (batch, heads, rows, _), (sample, head, row, _) = tensor.shape, tensor.stride()
    if not batch * heads * rows:
        return f"expected elements, got the shape {tuple(tensor.shape)}"
    size = tensor.element_size()
    # a stride that is never taken can be anything; a bit that any of the others has is set
    taken = row | (sample if batch > 1 else 0) | (head if heads > 1 else 0)
    if taken * size % ALIGNMENT:
        got = [step * size for step in (sample, head, row)]
        return f"expected strides of whole {ALIGNMENT} bytes, got {got} bytes"
    if tensor.data_ptr() % ALIGNMENT:
        return f"expected data that starts at a multiple of {ALIGNMENT} bytes"
    return None


def backward_form(
    query: Tensor, key: Tensor, value: Tensor, dout: Tensor, call: KernelArguments
) -> str:
    """Form of the kernels that compute the gradients of a call: "gluon" where that can, else
    "pointers".
    """
    features = call.features
    # rows of one warpgroup; wide heads spill where a program has only one
    least = 64 if max(features.PAD, features.PAD_V) <= 64 else 128
    small = features.KIND == "sparse" and min(features.BLOCK_Q, features.BLOCK_KV) < least
    elsewhere = configs.device_arch(query.device) != 90 or not configs.hopper_forms()
    if elsewhere or small:
        return "pointers"
    misfit = any(_misfit(tensor) is not None for tensor in (query, key, value, dout))
    chosen = configs.pointers_in_use("backward_q", *configs.KEY_PASSES)
    return "pointers" if misfit or chosen else "gluon"
