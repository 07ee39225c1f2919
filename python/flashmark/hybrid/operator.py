"""The far field of hybrid attention: `flashmark::hybrid_sums_*`, what slots hold;
`flashmark::hybrid_running_sums` and `flashmark::hybrid_scan_*`, totals over chunks;
`flashmark::hybrid_mass_*`, how queries read those with merge="mass".
"""

from __future__ import annotations

import importlib

import torch

from flashmark.flops import FORMULAS
from flashmark.library import register

_MODULES = {
    "eager": "flashmark.hybrid.eager",
    "triton": "flashmark.kernels.hybrid",
    "cpu": "flashmark.hybrid.eager",  # dense products, which PyTorch does as fast as the machine
}

_SUMS = "Tensor key, Tensor value, Tensor landmarks, Tensor? keep, float scale, str backend"


def _backend(name: str, key):
    """The module that runs. Empty tensors leave kernels nothing to launch."""
    return importlib.import_module(_MODULES["eager" if key.numel() == 0 else name])


def _sums(key, *rest):
    *rest, backend = rest
    return _backend(backend, key).forward(key, *rest)


def _sums_fake(key, value, landmarks, *_):
    dtype = torch.promote_types(key.dtype, torch.float32)
    n = key.new_empty(*key.shape[:3], landmarks.shape[-2], dtype=dtype)
    return n, n.new_empty(*n.shape, key.shape[-1]), n.new_empty(*n.shape, value.shape[-1])


def _sums_backward(dn, dK, dV, key, *rest):
    *rest, backend = rest
    return _backend(backend, key).backward(dn, dK, dV, key, *rest)


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
    return _mass_backend(backend, query).forward(query, *rest)


def _mass_backward(*inputs):
    *inputs, backend = inputs
    return _mass_backend(backend, inputs[2]).backward(*inputs)


def _mass_backend(name: str, query):
    triton = name == "triton" and query.numel() > 0
    module = "flashmark.kernels.hybrid.mass" if triton else "flashmark.hybrid.eager_mass"
    return importlib.import_module(module)


def _scan(*inputs):
    return importlib.import_module("flashmark.hybrid.eager_scan").forward(*inputs)


def _scan_backward(*inputs):
    return importlib.import_module("flashmark.hybrid.eager_scan").backward(*inputs)


def _mass_fake(query, landmarks, core, L, R, *_):
    mass = L.new_empty(query.shape[:4])
    return L.new_empty(*query.shape[:4], R.shape[4]), mass, torch.empty_like(mass)


def _mass_backward_fake(dnumerator, dmass, query, landmarks, core, L, R, *_):
    return tuple(x.new_empty(x.shape) for x in (query, landmarks, core, L, R))


def _running(x, reverse):
    return importlib.import_module("flashmark.hybrid.eager_scan").running_sums(x, reverse)


def _running_fake(x, reverse):
    return x.new_empty(x.shape)


def _scan_fake(l, r):  # noqa: E741, the letters of the formula
    return l.new_empty(l.shape), r.new_empty(r.shape)


def _scan_backward_fake(dL, dR, l, r, L, R):  # noqa: E741
    return _scan_fake(l, r)


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
register("hybrid_running_sums(Tensor x, bool reverse) -> Tensor", _running, _running_fake)
register(
    "hybrid_scan_forward(Tensor l, Tensor r) -> (Tensor L, Tensor R)",
    _scan,
    _scan_fake,
)
register(
    "hybrid_scan_backward(Tensor dL, Tensor dR, Tensor l, Tensor r, Tensor L, Tensor R) "
    "-> (Tensor dl, Tensor dr)",
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
