"""Registered operators: one schema made from a dataclass, one overload a backend."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmark import cpu
from flashmark.autograd import (
    boundary,
    boundary_arguments,
    needs_gradient,
    transformed,
    transforms,
    untraced,
    without_autocast,
)
from flashmark.flops import FORMULAS, register_if_counting
from flashmark.masks.block_mask import BlockMask, pack_mask, unpack_mask

_LIBRARY = torch.library.Library("flashmark", "FRAGMENT")
_TYPES = {
    Tensor: ("Tensor {}",),
    Tensor | None: ("Tensor? {}",),
    int: ("SymInt {}",),
    float: ("float {}",),
    bool: ("bool {}",),
    str: ("str {}",),
    BlockMask: ("Tensor[] {}", "SymInt[] {}_layout", "str {}_kind"),
}
_load = functools.cache(importlib.import_module)


def schema_of(call: type) -> str:
    """Arguments of a schema, from the fields of a dataclass."""
    types = typing.get_type_hints(call)
    names = (field.name for field in dataclasses.fields(call))
    return ", ".join(part.format(name) for name in names for part in _TYPES[types[name]])


class Operator:
    """`flashmark::<name>_forward` and `flashmark::<name>_backward`, an overload for each backend.

    Args:
        name: of the operator, such as "block_sparse".
        call: a dataclass that holds all checked arguments; its fields make the schema.
        saved: NamedTuple of the forward's outputs, all tensors.
        grads: NamedTuple of gradients; `dkey` is that of the field `key`.
        backends: module of each backend, with `forward(call) -> saved` and `backward(call, saved,
            *gradients of the outputs) -> grads`; None for one in C++, which registers itself under
            the CPU key.
        forward_fake: the outputs of a call, without values.
        kept: outputs that a backward reads; the others are None in its `saved`.
        constants: outputs without a gradient, the last ones.
        composed: module with the same `forward(call) -> saved` out of differentiable PyTorch
            functions (constants may be left empty), for what the backends have no formula for:
            without it forward mode and derivatives of gradients raise an error.
        dims: letters for the dimensions of every tensor field and output, a choice for each number
            of dimensions; see `flashmark.folding`.
        unfoldable: fields that, where they are given, keep a mapped dimension out of "B" or "H".
        jvp: module of each backend with `jvp(call, tangents) -> (saved, tangents of the
            differentiable outputs)`, `tangents` a tuple like `grads`; None for one in C++.
        forward_flops, backward_flops: formulas, of a call.
    """

    def __init__(
        self,
        name: str,
        call: type,
        saved: type,
        grads: type,
        backends: dict[str, str | None],
        *,
        forward_fake: Callable[[Any], Any],
        composed: str | None = None,
        dims: dict[str, tuple[str, ...]] | None = None,
        unfoldable: dict[str, str] | None = None,
        jvp: dict[str, str | None] | None = None,
        kept: tuple[str, ...] | None = None,
        constants: tuple[str, ...] = (),
        forward_flops: Callable[[Any], int] | None = None,
        backward_flops: Callable[[Any], int] | None = None,
    ):
        self.name, self.call, self.saved, self.grads = name, call, saved, grads
        self.outputs: tuple[str, ...] = saved._fields  # type: ignore[attr-defined]
        self.kept = self.outputs if kept is None else kept
        self.differentiable = self.outputs[: len(self.outputs) - len(constants)]
        fields = self._fields = [field.name for field in dataclasses.fields(call)]
        self._values = operator.attrgetter(*fields)
        masks = [n for n, x in enumerate(fields) if typing.get_type_hints(call)[x] is BlockMask]
        self.mask_at = masks[0] if masks else None
        wanted = [fields.index(x[1:]) for x in grads._fields]  # type: ignore[attr-defined]
        #: places among the flat arguments that have a gradient
        self.gradient_at = [n + 2 if masks and n > masks[0] else n for n in wanted]
        self.wanted = [fields[place] for place in wanted]  # fields that have one
        types = typing.get_type_hints(call)
        self.fields = [name for name in fields if types[name] in (Tensor, Tensor | None)]
        self.dims, self.unfoldable, self._composed = dims or {}, unfoldable or {}, composed
        self.forward: dict[str, Any] = {}
        self.backward: dict[str, Any] = {}
        self.jvp: dict[str, Any] = {}
        self._forward_fake = forward_fake
        self._define(backends)
        self._define_jvp(jvp or {})
        self._boundary = boundary(self)
        if forward_flops is not None:
            FORMULAS[f"{name}_forward"] = lambda *flat, **_: forward_flops(self.unflatten(flat))
        if backward_flops is not None:
            skip = len(self.differentiable) + len(self.kept)
            FORMULAS[f"{name}_backward"] = lambda *flat, **_: backward_flops(
                self.unflatten(flat[skip:])
            )

    def flatten(self, call) -> tuple:
        """Arguments of the overloads."""
        if torch.compiler.is_compiling():  # it does not know attrgetter
            flat = tuple([getattr(call, name) for name in self._fields])
        else:
            flat = self._values(call)
        at = self.mask_at
        return flat if at is None else (*flat[:at], *pack_mask(flat[at]), *flat[at + 1 :])

    def unflatten(self, flat):
        """The call that was flattened."""
        at = self.mask_at
        if at is None:
            return self.call(*flat)
        return self.call(*flat[:at], unpack_mask(*flat[at : at + 3]), *flat[at + 3 :])

    def run(self, call, backend: str):
        """Outputs of a call, differentiable where an argument needs a gradient."""
        if not torch.compiler.is_compiling():
            register_if_counting()
            if transformed():
                saved = transforms().run(self, call, backend)
                if saved is not None:
                    return saved
        elif transformed():
            return untraced().run(self, call, backend)
        flat = self.flatten(call)
        if needs_gradient(flat, self.gradient_at):
            given = boundary_arguments(flat, self.mask_at, self.gradient_at)
            return self.saved(*self._boundary.apply(backend, *given))
        return self.saved(*self.forward[backend](*flat))

    def composed(self, call):
        """Outputs of a call out of differentiable PyTorch functions."""
        if self._composed is None:
            raise NotImplementedError(
                f"{self.name}_attention: expected first derivatives alone, got forward mode or a "
                "derivative of a gradient, for which it has no formula"
            )
        return _load(self._composed).forward(call)

    def _define(self, backends: dict[str, str | None]) -> None:
        arguments = schema_of(self.call)
        results = ", ".join(f"Tensor {x}" for x in self.outputs)
        first, *rest = self.differentiable
        incoming = [f"Tensor d{first}", *(f"Tensor? d{x}" for x in rest)]
        incoming += [f"Tensor {x}" for x in self.kept]
        grads = ", ".join(f"Tensor {x}" for x in self.grads._fields)  # type: ignore[attr-defined]
        for backend, module in backends.items():
            forward = f"{self.name}_forward.{backend}({arguments}) -> ({results})"
            run = functools.partial(self._run_forward, module) if module else None
            self.forward[backend] = overload(forward, run, self._fake_forward)
            given = f"{', '.join(incoming)}, {arguments}"
            backward = f"{self.name}_backward.{backend}({given}) -> ({grads})"
            run = functools.partial(self._run_backward, module) if module else None
            self.backward[backend] = overload(backward, run, self._fake_backward)

    def _define_jvp(self, modules: dict[str, str | None]) -> None:
        tangents = ", ".join(f"Tensor? t{x}" for x in self.wanted)
        results = [f"Tensor {x}" for x in self.outputs]
        results += [f"Tensor t{x}" for x in self.differentiable]
        for backend, module in modules.items():
            schema = f"{self.name}_jvp.{backend}({tangents}, {schema_of(self.call)})"
            run = functools.partial(self._run_jvp, module) if module else None
            schema = f"{schema} -> ({', '.join(results)})"
            self.jvp[backend] = overload(schema, run, self._fake_jvp)

    def _run_jvp(self, module: str, *flat):
        count = len(self.wanted)
        call = self.unflatten(flat[count:])
        with without_autocast(call.query.device.type):
            saved, tangents = _load(module).jvp(call, self.grads(*flat[:count]))
        return (*saved, *tangents)

    def _fake_jvp(self, *flat):
        outs = self._fake_forward(*flat[len(self.wanted) :])
        return (*outs, *(torch.empty_like(x) for x in outs[: len(self.differentiable)]))

    def _run_forward(self, module: str, *flat):
        with without_autocast(flat[0].device.type):  # dtypes are chosen already
            return tuple(_load(module).forward(self.unflatten(flat)))

    def _fake_forward(self, *flat):
        return tuple(self._forward_fake(self.unflatten(flat)))

    def _run_backward(self, module: str, *flat):
        douts, saved, call = self._split(flat)
        with without_autocast(flat[0].device.type):
            grads = _load(module).backward(call, saved, *douts)
        return tuple(flat[0].new_empty(0) if x is None else x.contiguous() for x in grads)

    def _fake_backward(self, *flat):
        call = flat[len(self.differentiable) + len(self.kept) :]
        like = [call[place] for place in self.gradient_at]
        return tuple(flat[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in like)

    def _split(self, flat):
        """Gradients of the outputs, saved outputs, and the call, of a backward's arguments."""
        outs, kept = len(self.differentiable), len(self.kept)
        saved = dict.fromkeys(self.outputs)
        saved.update(zip(self.kept, flat[outs : outs + kept], strict=True))
        return flat[:outs], self.saved(**saved), self.unflatten(flat[outs + kept :])


def overload(schema: str, implementation: Callable | None, fake: Callable):
    """Define an overload, and return it. Without an implementation a C++ library brings it."""
    full_name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name, variant = full_name.split(".")
    found = getattr(getattr(torch.ops.flashmark, name), variant)
    run = implementation or functools.partial(_load_and_run, found)
    _LIBRARY.impl(full_name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmark::{full_name}", fake, lib=_LIBRARY)
    return found


def _load_and_run(overload, *flat):
    """Run the C++ kernel of an overload, which takes this function's place once it is loaded."""
    reason = cpu.why_not()
    if not reason and flat[0].device.type != "cpu":
        reason = f"it needs CPU tensors, not {flat[0].device.type}"
    if not reason and not torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU"):
        reason = "the C++ CPU kernels were built from other sources"
    if reason:
        raise NotImplementedError(f"backend: 'cpu' cannot run, {reason}")
    return overload(*flat)


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define `flashmark::<schema>`: one implementation for every device, and a fake one."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(implementation)
    def run(first: torch.Tensor, *args):
        with without_autocast(first.device.type):  # dtypes are chosen already
            return implementation(first, *args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmark::{name}", fake, lib=_LIBRARY)
