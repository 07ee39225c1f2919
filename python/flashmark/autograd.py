"""What the autograd boundaries of all operators share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flashmark.tracing import constant_when_traced


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as `scaled_dot_product_attention` does."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if not autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x for x in tensors
    )


def autocast_is_on(device_type: str) -> bool:
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@constant_when_traced
def has_autocast(device_type: str) -> bool:
    """Whether autocast knows the device: torch.compile cannot ask, in torch 2.11."""
    return torch.amp.is_autocast_available(device_type)


_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """For small matrices that must not lose precision."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, each its own object: torch.compile refuses one that is passed twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(x.view_as(x) for x in tensors)


def unit_stride(x: Tensor) -> Tensor:
    """The same tensor where its last dimension is contiguous, else a copy: what backends expect."""
    return x if x.stride(-1) == 1 else x.contiguous()


def refuse_transforms(name: str) -> None:
    """Explicit backwards and operators without batching rules: torch.func cannot see through."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"{name}: expected no torch.jit.trace, got one; use torch.export or torch.compile"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{name}: expected no transform of torch.func (vmap, grad, jvp, ...), got one; put a "
            "mapped dimension into the batch, and use torch.autograd for gradients"
        )


def _one_by_one(backward: Callable, ctx, grads: tuple) -> tuple:
    """Gradients of a batch of incoming ones (`is_grads_batched`, vectorised Jacobians), in a loop.

    These come as tensors with a hidden dimension, for which our operators have no rule.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    if torch.compiler.is_compiling() or not any(x is not None and batched(x) for x in grads):
        return backward(ctx, *grads)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    opened = [
        torch._remove_batch_dim(x, level, 0, 0) if x is not None and batched(x) else None
        for x in grads
    ]
    count = next(len(x) for x in opened if x is not None)
    results = [
        backward(ctx, *(g if x is None else x[n] for g, x in zip(grads, opened, strict=True)))
        for n in range(count)
    ]
    return tuple(
        None if x[0] is None else torch._add_batch_dim(torch.stack(x), 0, level)
        for x in zip(*results, strict=True)
    )


def first_order(name: str) -> Callable[[Callable], Callable]:
    """For an explicit `backward`: differentiating its results again raises an error.

    Stricter than PyTorch's `once_differentiable`, which lets them pass for constants where the
    incoming gradient is one (that of a plain sum, say).
    """
    message = f"{name}: expected first derivatives only, got a second one: it has no formula"

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *grads):
            with torch.no_grad():
                found = _one_by_one(backward, ctx, grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return found
            refuse = torch._C._functions.DelayedError(message.encode(), len(found))
            return refuse(*(None if x is None else x.detach().requires_grad_() for x in found))

        return run

    return decorate
