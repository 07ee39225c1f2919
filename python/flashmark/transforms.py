"""Operators under `torch.func` and forward mode, and the derivatives of their gradients.

Values come from the kernels of a backend. What they have no formula for is derived by autograd from
the operator composed of PyTorch functions (`Operator.composed`):

- vmap folds the mapped dimension into the heads or the batch of one call;
- forward mode runs the operator's kernel for tangents, or the composition;
- a gradient that is differentiated again is recomputed by the composition.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from flashmark.folding import Fold, axis_for, combined, fold, select, unfold
from flashmark.masks.block_mask import BlockMask
from flashmark.masks.cache import block_mask_for
from flashmark.masks.expression import Mask


@dataclasses.dataclass(frozen=True)
class Task:
    """A forward, backward or forward-mode pass of an operator, without its tensors.

    `names` are those of the tensors that go with it: fields of the call; `:n` the n-th tensor that
    a mask expression reads; for a backward `d <output>` and `= <output>`, gradients and saved
    outputs; in forward mode `t <field>`, tangents.
    """

    operator: Any
    kind: str  # "forward", "backward", "jvp"
    backend: str
    call: Any  # its tensor fields are None
    mask: BlockMask | Mask | None
    names: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    duals: tuple[Tensor, ...] = ()  # jvp: the fields with their tangents

    def call_of(self, given: dict[str, Tensor]):
        """The call with its tensors and its mask."""
        fields = {n: x for n, x in given.items() if n in self.operator.fields}
        if self.mask is not None:
            read = [x for n, x in given.items() if n.startswith(":")]
            call = dataclasses.replace(self.call, **fields)
            fields["mask"] = combined(self.mask, read, self.folds, call)
        return dataclasses.replace(self.call, **fields)

    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The backend's results, for plain tensors."""
        given = {n: _unit_stride(x) for n, x in zip(self.names, tensors, strict=True)}
        operator = self.operator
        flat = operator.flatten(self.call_of(given))
        if self.kind == "forward":
            return tuple(operator.forward[self.backend](*flat))
        if self.kind == "jvp":
            tangents = [given.get(f"t {x}") for x in operator.wanted]
            return tuple(operator.jvp[self.backend](*tangents, *flat))
        dout, *rest = (given.get(f"d {x}") for x in operator.differentiable)
        saved = [given[f"= {x}"] for x in operator.kept]
        if dout is None:
            query, value = given["query"], given["value"]
            dout = query.new_zeros(*query.shape[:3], value.shape[3])
        found = operator.backward[self.backend](dout, *rest, *saved, *flat)
        return tuple(x for x, n in zip(found, operator.wanted, strict=True) if n in given)

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Results of `run`, from functions that PyTorch can differentiate and transform."""
        given = dict(zip(self.names, tensors, strict=True))
        if self.kind == "forward":
            return self._composed(given)
        wanted = [x for x in self.operator.wanted if x in given]

        def outputs(*x: Tensor) -> tuple[Tensor, ...]:
            return self._composed({**given, **dict(zip(wanted, x, strict=True))})

        outs, pull = torch.func.vjp(outputs, *(given[x] for x in wanted))  # type: ignore[misc]
        names = self.operator.differentiable
        if self.kind == "backward":
            douts = [given.get(f"d {n}") for n in names]
            return pull(tuple(
                torch.zeros_like(x) if d is None else d for x, d in zip(outs, douts, strict=True)
            ))  # fmt: skip
        # the transpose of the linear map `pull`: no second kind of differentiation is needed
        zeros = tuple(torch.zeros_like(x) for x in outs)
        _, push = torch.func.vjp(lambda *d: pull(d), *zeros)  # type: ignore[misc]
        tangents = tuple(
            torch.zeros_like(given[x]) if f"t {x}" not in given else given[f"t {x}"] for x in wanted
        )
        return (*outs, *push(tangents))

    def _composed(self, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = {n: x if x.is_floating_point() else opened_tensor(x) for n, x in given.items()}
        call = self.call_of(given)
        return tuple(self.operator.composed(call)[: len(self.operator.differentiable)])

    def then(self, kind: str, given: dict[str, Tensor], **changes) -> tuple[Task, list[Tensor]]:
        """Another pass of the same call, and its tensors."""
        task = dataclasses.replace(self, kind=kind, names=tuple(given), **changes)
        return task, list(given.values())


class Transformed(torch.autograd.Function):
    """A pass of an operator that all transforms of PyTorch but forward mode know."""

    @staticmethod
    def forward(task: Task, *tensors: Tensor) -> tuple[Tensor, ...]:
        return task.run(tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs) -> None:
        task, *tensors = inputs
        ctx.task, names = task, task.operator.outputs
        kept = ()
        if task.kind != "backward":
            kept = tuple(x for n, x in zip(names, outputs, strict=False) if n in task.operator.kept)
            ctx.mark_non_differentiable(*outputs[len(task.operator.differentiable) : len(names)])
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        task, operator, saved = ctx.task, ctx.task.operator, ctx.saved_tensors
        tensors, kept = saved[: len(task.names)], saved[len(task.names) :]
        given = dict(zip(task.names, tensors, strict=True))
        names = operator.differentiable
        later = grads[len(operator.outputs) :]  # of tangents
        if has_tangents(*task.duals):  # the tangents of a gradient, which autograd takes for values
            fields = [n for n in task.names if n in operator.fields]
            inputs = dict(zip(fields, task.duals, strict=True))
            inputs |= {n: x for n, x in given.items() if n.startswith(":")}
            forward, _ = task.then("forward", inputs, duals=())
            found = _recomputed(forward, inputs, grads[: len(names)])
            by_name = dict(zip(inputs, found, strict=True))
            return None, *(by_name.get(n) for n in task.names)
        if task.kind == "backward" or any(x is not None for x in later) or has_tangents(*grads):
            if task.kind != "backward":  # without those of constants
                grads = (*grads[: len(names)], *later)
            return None, *_recomputed(task, given, grads)
        douts = {f"d {n}": x for n, x in zip(names, grads, strict=False) if x is not None}
        if not douts:
            return None, *(None for _ in task.names)
        fields = {n: x for n, x in given.items() if not n.startswith("t ")}
        outs = {f"= {n}": x for n, x in zip(operator.kept, kept, strict=True)}
        backward, inputs = task.then("backward", douts | outs | fields, duals=())
        found = Transformed.apply(backward, *inputs)
        by_name = dict(zip((x for x in operator.wanted if x in given), found, strict=True))
        return None, *(by_name.get(n) for n in task.names)

    @staticmethod
    def vmap(info, in_dims, task: Task, *tensors: Tensor):
        dims = in_dims[1:]
        given = dict(zip(task.names, tensors, strict=True))
        mapped = dict(zip(task.names, dims, strict=True))
        axis = axis_for(task, given, mapped)
        if axis is None:
            each = [
                _next(task, [select(x, d, n) for x, d in zip(tensors, dims, strict=True)])
                for n in range(info.batch_size)
            ]
            return tuple(torch.stack(x) for x in zip(*each, strict=True)), (0,) * len(each[0])
        folded = fold(task, axis, info.batch_size, given, mapped)
        of_mask = any(n.startswith(":") and d is not None for n, d in mapped.items())
        step = Fold(axis, info.batch_size, of_mask)
        inner = dataclasses.replace(task, folds=(*task.folds, step), duals=())
        return unfold(task, axis, info.batch_size, given, _next(inner, folded))


def run(operator, call, backend: str):
    """Outputs of a call where transforms are active, or None where they leave it alone."""
    fields = {n: x for n in operator.fields if (x := getattr(call, n)) is not None}
    if _functorch.peek_interpreter_stack() is None and not has_tangents(*fields.values()):
        return None
    task, inputs = _task(operator, call, backend, fields)
    return operator.saved(*_next(task, list(inputs.values())))


def gradients(operator, call, backend: str, saved, douts) -> dict[str, Tensor]:
    """Gradients of a call by the backend, which can be differentiated again."""
    fields = {n: x for n in operator.fields if (x := getattr(call, n)) is not None}
    task, inputs = _task(operator, call, backend, fields)
    names = operator.differentiable
    if has_tangents(*douts):
        found = _recomputed(task, inputs, douts)
        return {n: x for n, x in zip(inputs, found, strict=True) if x is not None}
    given = {f"d {n}": x for n, x in zip(names, douts, strict=True) if x is not None}
    given |= {f"= {n}": x for n, x in zip(operator.kept, saved, strict=True)}
    task, tensors = task.then("backward", given | inputs)
    found = Transformed.apply(task, *tensors)
    return dict(zip((n for n in operator.wanted if n in fields), found, strict=True))


def _task(operator, call, backend: str, fields: dict[str, Tensor]):
    """The forward pass of a call, and its tensors by name."""
    mask = getattr(call, "mask", None)
    read = mask.tensors() if isinstance(mask, Mask) else ()
    inputs = fields | {f":{n}": x for n, x in enumerate(read)}
    rest = dataclasses.replace(call, **dict.fromkeys(fields))
    return Task(operator, "forward", backend, rest, mask, tuple(inputs)), inputs


def _next(task: Task, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Results of a pass under the transforms that are active."""
    if task.kind != "forward":
        return Transformed.apply(task, *tensors)
    stack = [x.key() for x in _functorch.get_interpreter_stack() or ()]
    count = stack.count(TransformType.Jvp)
    if not count and not has_tangents(*tensors):
        return Transformed.apply(task, *tensors)
    if stack and stack[-1] == TransformType.Vmap:  # forward mode is below
        return Transformed.apply(task, *tensors)
    one = not stack or (count == 1 and stack[-1] == TransformType.Jvp)
    if one and task.backend in task.operator.jvp:
        return _with_tangents(task, tensors)
    outs = task.plain(*tensors)
    constants = task.operator.outputs[len(outs) :]  # of interest to a backward alone
    return (*outs, *(outs[0].new_zeros(0) for _ in constants))


def _with_tangents(task: Task, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs with their tangents, of tensors that may have some, by the backend."""
    operator, given = task.operator, dict(zip(task.names, tensors, strict=True))
    fields = {n: x for n, x in given.items() if n in operator.fields}
    pairs = {n: forward_ad.unpack_dual(x) for n, x in fields.items()}
    tangents = {f"t {n}": pairs[n].tangent for n in operator.wanted if n in pairs}
    tangents = {n: x for n, x in tangents.items() if x is not None}
    if not tangents:
        return Transformed.apply(task, *tensors)
    primals = {n: pairs[n].primal if n in pairs else x for n, x in given.items()}
    jvp, inputs = task.then("jvp", tangents | primals, duals=tuple(fields.values()))
    outs = Transformed.apply(jvp, *inputs)
    count = len(operator.outputs)
    dual = [forward_ad.make_dual(x, t) for x, t in zip(outs, outs[count:], strict=False)]
    return (*dual, *outs[len(dual) : count])


def _recomputed(task: Task, given: dict[str, Tensor], grads) -> list[Tensor | None]:
    """Gradients of a pass's inputs, by autograd of its composition."""
    names = [n for n, x in given.items() if x.is_floating_point() and n[0] not in ":="]
    recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0

    def outputs(*x: Tensor) -> tuple[Tensor, ...]:
        return task.plain(*(given | dict(zip(names, x, strict=True))).values())

    inputs = [given[n] if recorded else given[n].detach() for n in names]
    outs, pull = torch.func.vjp(outputs, *inputs)  # type: ignore[misc]
    grads = tuple(
        torch.zeros_like(x) if g is None else g for x, g in zip(outs, grads, strict=False)
    )
    found = dict(zip(names, pull(grads), strict=True))
    return [found.get(n) for n in given]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def has_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward mode is on and some tensor has a tangent, under whatever transforms."""
    if forward_ad._current_level < 0:
        return False
    for x in tensors:
        while x is not None:
            if forward_ad.unpack_dual(x).tangent is not None:
                return True
            x = _functorch.get_unwrapped(x) if _functorch.is_functorch_wrapped_tensor(x) else None
    return False


def is_transformed(*tensors: Tensor) -> bool:
    """Whether some tensor belongs to a transform of torch.func, or has a tangent."""
    return any(map(_functorch.is_functorch_wrapped_tensor, tensors)) or has_tangents(*tensors)


def mask_of(mask, batch: int, heads: int, q_len: int, kv_len: int, device) -> BlockMask | Mask:
    """`block_mask_for` where transforms may be active: an expression stays one where it reads
    mapped tensors."""
    with temporarily_clear_interpreter_stack():
        if isinstance(mask, Mask) and mask.tensors():
            opened = mask.mapped(opened_tensor)
            if any(map(_functorch.is_functorch_wrapped_tensor, opened.tensors())):
                return mask
            mask = opened
        return block_mask_for(mask, batch, heads, q_len, kv_len, device)


def opened_tensor(x: Tensor) -> Tensor:
    """The tensor inside the wrappers of grad and jvp."""
    while _functorch.is_gradtrackingtensor(x):
        x = _functorch.get_unwrapped(x)
    return x
