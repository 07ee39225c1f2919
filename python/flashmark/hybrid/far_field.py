"""The far field of hybrid attention: what landmarks keep of chunks of keys, and running totals.

"slots" has plain sums of chunks; "mass" and "gate" have states of Nyström attention, merged in log
space. The operators `flashmark::hybrid_sums_*`, `hybrid_running_sums`, `hybrid_scan_*` and
`hybrid_mass_*` are those of `flashmark.hybrid.eager`, or Triton kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.autograd import explicit, recomputed, transformed, unit_stride
from flashmark.flops import FORMULAS
from flashmark.hybrid import eager, far_composed
from flashmark.hybrid.state import Totals
from flashmark.library import register
from flashmark.nystrom import NystromState
from flashmark.nystrom import operator as nystrom
from flashmark.nystrom.call import Call as NystromCall


class Far(NamedTuple):
    """The parameters of a far field."""

    merge: str
    landmark_queries: Tensor  # (Hkv, M, D) or (B, Hkv, M, D)
    landmark_keys: Tensor
    core: Tensor | None
    scale: float
    backend: str


def of_chunks(far: Far, key: Tensor, value: Tensor, keep: Tensor | None) -> Totals:
    """Totals of each chunk by itself, from key (B, H, C, w, D), value alike and keep (B, C, w)."""
    if far.merge == "slots":
        key, value = unit_stride(key), unit_stride(value)
        return _applied(
            _RoutedSums,
            far_composed.sums,
            key,
            value,
            far.landmark_queries,
            keep,
            far.scale,
            far.backend,
        )
    batch, heads, chunks, _, _ = key.shape
    query = key.new_empty(batch * chunks, heads, 0, key.shape[4])
    assert far.core is not None
    call = NystromCall(
        query, unit_stride(by_sample(key)), unit_stride(by_sample(value)),
        *_landmarks(far, chunks), _of_samples(far.core.detach(), chunks), far.scale,
        key_mask=None if keep is None else keep.flatten(0, 1), is_causal=False,
    )  # fmt: skip
    _, L, R = nystrom.run(call, far.backend)
    return tuple(x.unflatten(0, (batch, chunks)).transpose(1, 2) for x in (L, R))


def added(far: Far, left: Totals, right: Totals) -> Totals:
    """Sum of two totals."""
    if far.merge == "slots":
        return tuple(a + b for a, b in zip(left, right, strict=True))
    return NystromState(*left).merge(NystromState(*right), 0)


def running(far: Far, totals: Totals) -> Totals:
    """Inclusive running totals over the chunks."""
    if far.merge == "slots":
        return tuple(
            _applied(_RunningSums, far_composed.running_sums, x, far.backend) for x in totals
        )
    return _applied(_RunningStates, far_composed.running_states, *totals, far.backend)


def by_sample(x: Tensor) -> Tensor:
    """(B, H, C, n, *) -> (B C, H, n, *): chunks as samples."""
    return x.transpose(1, 2).flatten(0, 1)


def _of_samples(x: Tensor, chunks: int) -> Tensor:
    """Parameters of samples, repeated for their chunks; shared ones stay."""
    return x if x.dim() == 3 else x.repeat_interleave(chunks, 0)


def _landmarks(far: Far, chunks: int) -> tuple[Tensor, Tensor]:
    """Landmark queries and keys of samples; tied ones are one tensor."""
    lq = unit_stride(_of_samples(far.landmark_queries, chunks))
    if far.landmark_keys is far.landmark_queries:
        return lq, lq
    return lq, unit_stride(_of_samples(far.landmark_keys, chunks))


def nystrom_read(far: Far, query: Tensor, totals: Totals) -> Tensor:
    """(B, Hq, C, w, Dv): Nyström attention of each chunk of queries to its state alone."""
    batch, _, chunks, _, dim = query.shape
    heads, v_dim = totals[1].shape[1], totals[1].shape[4]
    key = query.new_empty(batch * chunks, heads, 0, dim)
    value = query.new_empty(batch * chunks, heads, 0, v_dim)
    L, R = (by_sample(x) for x in totals)
    assert far.core is not None
    call = NystromCall(
        unit_stride(by_sample(query)), key, value, *_landmarks(far, chunks),
        _of_samples(far.core, chunks), far.scale, L0=L, R0=R, is_causal=False,
    )  # fmt: skip
    out = nystrom.run(call, far.backend).out
    return out.unflatten(0, (batch, chunks)).transpose(1, 2)


def mass_read(far: Far, query: Tensor, totals: Totals) -> tuple[Tensor, Tensor, Tensor]:
    """(numerator, mass, reference) of each row, times e^reference the true ones."""
    given = query, far.landmark_keys, far.core, *totals, far.scale, far.backend
    return _applied(_MassRead, far_composed.mass, *given)


def _applied(function: type[torch.autograd.Function], composed: Callable, *given):
    """The function with explicit gradients; under torch.func and in forward mode, what it is
    composed of."""
    if transformed():
        return composed(*given)
    return function.apply(*given)


class _RoutedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key, value, landmarks, keep, scale, backend):
        ctx.save_for_backward(key, value, landmarks, keep)
        ctx.options = scale, backend
        return torch.ops.flashmark.hybrid_sums_forward(key, value, landmarks, keep, *ctx.options)

    @staticmethod
    @explicit(
        lambda ctx, *grads: recomputed(far_composed.sums, ctx.saved_tensors, ctx.options, grads)
    )
    def backward(ctx, dn, dK, dV):
        grads = torch.ops.flashmark.hybrid_sums_backward(
            *(x.contiguous() for x in (dn, dK, dV)), *ctx.saved_tensors, *ctx.options
        )
        return *grads, None, None, None


class _MassRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, landmarks, core, L, R, scale, backend):
        ctx.save_for_backward(query, landmarks, core, L, R)
        ctx.options = scale, backend
        numerator, mass, reference = torch.ops.flashmark.hybrid_mass_forward(
            query, landmarks, core, L, R, *ctx.options
        )
        ctx.mark_non_differentiable(reference)
        return numerator, mass, reference

    @staticmethod
    @explicit(
        lambda ctx, *grads: recomputed(far_composed.mass, ctx.saved_tensors, ctx.options, grads)
    )
    def backward(ctx, dnumerator, dmass, _):
        grads = torch.ops.flashmark.hybrid_mass_backward(
            dnumerator, dmass, *ctx.saved_tensors, *ctx.options
        )
        return *grads, None, None


class _RunningSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.backend = backend
        return torch.ops.flashmark.hybrid_running_sums(x, False, backend)

    @staticmethod
    @explicit(lambda ctx, dtotal: (dtotal.flip(2).cumsum(2).flip(2), None))
    def backward(ctx, dtotal):
        return torch.ops.flashmark.hybrid_running_sums(dtotal, True, ctx.backend), None


class _RunningStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_L, own_R, backend):
        L, R = torch.ops.flashmark.hybrid_scan_forward(own_L, own_R, backend)
        ctx.save_for_backward(own_L, own_R, L, R)
        ctx.backend = backend
        return L, R

    @staticmethod
    @explicit(
        lambda ctx, *grads: recomputed(
            far_composed.running_states, ctx.saved_tensors[:2], (ctx.backend,), grads
        )
    )
    def backward(ctx, dL, dR):
        grads = torch.ops.flashmark.hybrid_scan_backward(dL, dR, *ctx.saved_tensors, ctx.backend)
        return *grads, None


_SUMS = "Tensor key, Tensor value, Tensor landmarks, Tensor? keep, float scale, str backend"


def _backend(name: str, x: Tensor):
    """The module that runs. Empty tensors leave kernels nothing to launch."""
    triton = name == "triton" and x.numel() > 0
    return importlib.import_module("flashmark.kernels.hybrid") if triton else eager


def _sums(key, *rest):
    *rest, backend = rest
    return _backend(backend, key).sums_forward(key, *rest)


def _sums_fake(key, value, landmarks, *_):
    dtype = torch.promote_types(key.dtype, torch.float32)
    n = key.new_empty(*key.shape[:3], landmarks.shape[-2], dtype=dtype)
    return n, n.new_empty(*n.shape, key.shape[-1]), n.new_empty(*n.shape, value.shape[-1])


def _sums_backward(dn, dK, dV, key, *rest):
    *rest, backend = rest
    return _backend(backend, key).sums_backward(dn, dK, dV, key, *rest)


def _sums_backward_fake(dn, dK, dV, key, value, landmarks, *_):
    return tuple(x.new_empty(x.shape) for x in (key, value, landmarks))


register(f"hybrid_sums_forward({_SUMS}) -> (Tensor n, Tensor K, Tensor V)", _sums, _sums_fake)
register(
    f"hybrid_sums_backward(Tensor dn, Tensor dK, Tensor dV, {_SUMS}) "
    "-> (Tensor dkey, Tensor dvalue, Tensor dlandmarks)",
    _sums_backward,
    _sums_backward_fake,
)

_MASS = "Tensor query, Tensor landmarks, Tensor core, Tensor L, Tensor R, float scale, str backend"


def _mass(query, *rest):
    *rest, backend = rest
    return _backend(backend, query).mass_forward(query, *rest)


def _mass_backward(*inputs):
    *inputs, backend = inputs
    return _backend(backend, inputs[2]).mass_backward(*inputs)


def _mass_fake(query, landmarks, core, L, R, *_):
    mass = L.new_empty(query.shape[:4])
    return L.new_empty(*query.shape[:4], R.shape[4]), mass, torch.empty_like(mass)


def _mass_backward_fake(dnumerator, dmass, query, landmarks, core, L, R, *_):
    return tuple(x.new_empty(x.shape) for x in (query, landmarks, core, L, R))


def _running(x, reverse, backend):
    return _backend(backend, x).running_sums(x, reverse)


def _scan(own_L, own_R, backend):
    return _backend(backend, own_R).running_states(own_L, own_R)


def _scan_backward(dL, dR, own_L, own_R, L, R, backend):
    return _backend(backend, own_R).running_states_backward(dL, dR, own_L, own_R, L, R)


def _running_fake(x, reverse, backend):
    return x.new_empty(x.shape)


def _scan_fake(l, r, backend):  # noqa: E741, the letters of the formula
    return l.new_empty(l.shape), r.new_empty(r.shape)


def _scan_backward_fake(dL, dR, l, r, L, R, backend):  # noqa: E741
    return _scan_fake(l, r, backend)


register(
    f"hybrid_mass_forward({_MASS}) -> (Tensor numerator, Tensor mass, Tensor reference)",
    _mass,
    _mass_fake,
)
register(
    f"hybrid_mass_backward(Tensor dnumerator, Tensor dmass, {_MASS}) "
    "-> (Tensor dquery, Tensor dlandmarks, Tensor dcore, Tensor dL, Tensor dR)",
    _mass_backward,
    _mass_backward_fake,
)
register(
    "hybrid_running_sums(Tensor x, bool reverse, str backend) -> Tensor", _running, _running_fake
)
register(
    "hybrid_scan_forward(Tensor l, Tensor r, str backend) -> (Tensor L, Tensor R)",
    _scan,
    _scan_fake,
)
register(
    "hybrid_scan_backward(Tensor dL, Tensor dR, Tensor l, Tensor r, Tensor L, Tensor R, "
    "str backend) -> (Tensor dl, Tensor dr)",
    _scan_backward,
    _scan_backward_fake,
)


def _sums_flops(key, value, landmarks, *args, **kwargs) -> int:
    """s; K and V."""
    return 2 * _pairs(key, landmarks) * (2 * key.shape[4] + value.shape[4])


def _sums_backward_flops(dn, dK, dV, key, value, landmarks, *args, **kwargs) -> int:
    """s, dK . k, a dK, ds x and ds^T k; dV . v and a dV."""
    return 2 * _pairs(key, landmarks) * (5 * key.shape[4] + 2 * value.shape[4])


def _mass_flops(query, landmarks, core, L, R, *args, **kwargs) -> int:
    """The reading, F core, U R."""
    widths = query.shape[4] + landmarks.shape[-2] + R.shape[4]
    return 2 * _pairs(query, landmarks) * widths


def _mass_backward_flops(dn, dm, query, landmarks, core, L, R, *args, **kwargs) -> int:
    """The reading, dq and dx; F core, dF and dcore; dU and dR."""
    widths = 3 * query.shape[4] + 3 * landmarks.shape[-2] + 2 * R.shape[4]
    return 2 * _pairs(query, landmarks) * widths


def _pairs(x, landmarks) -> int:
    """(token, landmark) pairs of tokens (B, H, C, w, D)."""
    batch, heads, chunks, width, _ = x.shape
    return batch * heads * chunks * width * landmarks.shape[-2]


FORMULAS |= {
    "hybrid_sums_forward": _sums_flops,
    "hybrid_sums_backward": _sums_backward_flops,
    "hybrid_mass_forward": _mass_flops,
    "hybrid_mass_backward": _mass_backward_flops,
}
