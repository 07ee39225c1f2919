"""Helpers shared by the autograd boundaries of all operators."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashmark.tracing import constant_when_traced


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as `scaled_dot_product_attention` does."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
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
    return _is_available(device_type)


_is_available = functools.cache(torch.amp.is_autocast_available)


_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Run without autocast: small matrices must not lose precision."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as distinct objects: torch.compile refuses one object that is passed twice."""
    if not torch.compiler.is_compiling() or transformed():
        return tensors
    return tuple(x.view_as(x) for x in tensors)


def unit_stride(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy; backends expect it."""
    if x.stride(-1) == 1:
        return x
    # an empty tensor counts as contiguous, whatever its strides
    return x.contiguous() if x.numel() else x.clone(memory_format=torch.contiguous_format)


def refuse_tracing(name: str) -> None:
    """Raise inside torch.jit.trace, which knows nothing of operators with several backends."""
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise NotImplementedError(
            f"{name}: expected no torch.jit.trace, got one; use torch.export or torch.compile"
        )


def transformed() -> bool:
    """Whether torch.func or forward mode may be at work: where it may not, calls stay short."""
    return in_torch_func() or forward_ad._current_level >= 0


def check_no_derivative(name: str, *tensors: Tensor | None) -> None:
    """Refuse to write into the argument `name` where a derivative would have to follow."""
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError(
            f"{name}: expected a call without gradients (torch.no_grad), got inputs that require "
            "one"
        )
    if transformed() and not torch.compiler.is_compiling():
        if transforms().is_transformed(*given):
            raise ValueError(
                f"{name}: expected a call outside of torch.func and forward mode, got inputs of one"
            )


@constant_when_traced
def in_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


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


def untraced():
    """`flashmark.untraced`, imported where it is needed."""
    from flashmark import untraced

    return untraced


def explicit(again: Callable) -> Callable[[Callable], Callable]:
    """For an explicit `backward`: `again` computes the same where the result is to be
    differentiated, in reverse or in forward mode, and neither derivative may be left out."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *grads):
            if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or transformed()):
                with torch.no_grad():
                    return _one_by_one(backward, ctx, grads)
            return _one_by_one(again, ctx, grads)

        return run

    return decorate


def recomputed(function: Callable, inputs: Sequence, options: Sequence, grads: Sequence) -> tuple:
    """Gradients of the inputs and options of `function`, by autograd of it: they can be
    differentiated again."""
    at = [n for n, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]

    def outputs(*tensors: Tensor):
        given = list(inputs)
        for n, x in zip(at, tensors, strict=True):
            given[n] = x
        return function(*given, *options)

    outs, pull = torch.func.vjp(outputs, *(inputs[n] for n in at))  # type: ignore[misc]
    found = dict(zip(at, pull(grads if isinstance(outs, tuple) else grads[0]), strict=True))
    return tuple(found.get(n) for n in range(len(inputs) + len(options)))


def needs_gradient(flat: Sequence, places: Sequence[int]) -> bool:
    """Whether autograd must see a call: some of the tensors at these places ask for gradients."""
    if not torch.is_grad_enabled():
        return False
    for place in places:
        x = flat[place]
        if x is not None and x.requires_grad:
            return True
    return False


def transforms():
    """`flashmark.transforms`, imported where they are at work alone."""
    from flashmark import transforms

    return transforms


def boundary(operator) -> type[torch.autograd.Function]:
    """The differentiable form of a `flashmark.library.Operator`; see `boundary_arguments`."""
    at, places, kept = operator.mask_at, operator.gradient_at, operator.kept

    class Boundary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, backend, count, *args):
            flat, tensors = args[:count], args[count:]
            if at is not None:
                flat = (*flat[:at], tensors, *flat[at + 1 :])
            outputs = operator.forward[backend](*flat)
            read = (x for x, name in zip(outputs, operator.outputs, strict=True) if name in kept)
            ctx.save_for_backward(*read, *(x if isinstance(x, Tensor) else None for x in args))
            ctx.constants = tuple(None if isinstance(x, Tensor) else x for x in args)
            ctx.backend, ctx.count, ctx.like = backend, count, outputs[0].shape
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[len(operator.differentiable) :])
            return tuple(outputs)

        @staticmethod
        def given(ctx) -> tuple[tuple, tuple]:
            """Saved outputs, and the flat arguments of the call."""
            stored = ctx.saved_tensors
            saved, tensors = stored[: len(kept)], stored[len(kept) :]
            args = tuple(c if x is None else x for x, c in zip(tensors, ctx.constants, strict=True))
            flat, lists = args[: ctx.count], args[ctx.count :]
            if at is not None:
                flat = (*flat[:at], lists, *flat[at + 1 :])
            return saved, flat

        @staticmethod
        def again(ctx, *douts):
            saved, flat = Boundary.given(ctx)
            call, outs = operator.unflatten(flat), douts[: len(operator.differentiable)]
            found = transforms().gradients(operator, call, ctx.backend, saved, outs)
            grads = [None] * (2 + len(ctx.constants))
            for place, name in zip(places, operator.wanted, strict=True):
                grads[2 + place] = found.get(name)
            return tuple(grads)

        @staticmethod
        @explicit(lambda ctx, *douts: Boundary.again(ctx, *douts))
        def backward(ctx, *douts):
            saved, flat = Boundary.given(ctx)
            dout = flat[0].new_zeros(ctx.like) if douts[0] is None else unit_stride(douts[0])
            rest = douts[1 : len(operator.differentiable)]
            found = operator.backward[ctx.backend](dout, *rest, *saved, *flat)
            grads = [None] * (2 + len(ctx.constants))
            for place, grad in zip(places, found, strict=True):
                if flat[place] is not None:
                    grads[2 + place] = grad
            return tuple(grads)

    return Boundary


def boundary_arguments(flat: tuple, at: int | None, places: Sequence[int]) -> tuple:
    """Arguments of `Boundary.apply` after the backend: a count, and `flat` with the list of
    tensors at place `at` moved to the end."""
    if torch.compiler.is_compiling():  # it refuses one tensor that is passed twice
        flat = tuple(
            x.view_as(x) if n in places and x is not None else x for n, x in enumerate(flat)
        )
    if at is None:
        return (len(flat), *flat)
    return (len(flat), *flat[:at], None, *flat[at + 1 :], *flat[at])


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [
            torch.zeros_like(x) if needed else None
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        return grad, *zeros


def reached(out: Tensor, *parameters: Tensor | None) -> Tensor:
    """`out`, from which every parameter has a gradient: 0 where a short input does not use it.

    DistributedDataParallel waits for the gradient of each parameter.
    """
    given = [x for x in parameters if x is not None and x.requires_grad]
    if not given or not torch.is_grad_enabled() or transformed():
        return out
    return _Reached.apply(out, *given)
