"""flashmark.check: compare a backend with the float64 reference, outputs and gradients."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from flashmark import reference
from flashmark.reference.routed import choose

FORWARD_BUDGET, GRADIENT_BUDGET = 1e-5, 5e-5  # float32, relative
LEAST_GRADIENT = (
    1e-2  # a gradient that cancels to nothing is measured against this part of the largest
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared tensor. Errors are max |x - x64| / max |x64|."""

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `check`, a row for each output and gradient. True if all are within budget."""

    operator: str
    dtype: torch.dtype
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.operator}, {self.dtype}: {'ok' if self.ok else 'OVER BUDGET'}"]
        for row in self.rows:
            verdict = "ok" if row.ok else "OVER BUDGET"
            figures = f"error {row.error:8.2e}  budget {row.budget:8.2e}"
            lines.append(f"  {row.name:<{width}}  {figures}  {verdict}")
        return "\n".join(lines)


def check(op: Callable, *args, **kwargs) -> Report:
    """Run an operator and its float64 reference on the same inputs and compare outputs and
    gradients.

    Args:
        op: a public operator, such as `flashmark.block_sparse_attention`.
        args, kwargs: as for `op`. Every floating-point tensor among them gets a gradient, from
            random cotangents of all outputs. With dropout and no seed, one seed is drawn for all
            runs.

    Returns:
        Report: relative errors against budgets. float32: 1e-5 forward, 5e-5 gradients, plus 2 eps
            max|score|.
        Half precision: twice the error of the reference computed in that dtype, plus 2 rounding
        units.
        float64: the budget of float32 scaled by the ratio of their rounding units.
        `routed_attention` is held to the reference on the blocks that it chose itself; the row
        "choice" says how far, in float64, the worst chosen score lies below the best one that was
        not chosen, relative to the largest score.

    Memory is quadratic in the sequence length: check on small inputs.

    Raises:
        TypeError: `op` has no reference.
    """
    oracle = getattr(reference, getattr(op, "__name__", ""), None)
    if oracle is None:
        raise TypeError(f"op: expected an operator with a reference, got {op!r}")
    run, routed = op, None
    if op.__name__ == "routed_attention" and kwargs.get("backend") != "reference":
        routed = _Routed(op)
        run, oracle = routed.run, routed.definition
    if kwargs.get("dropout_p") and kwargs.get("dropout_seed") is None:
        kwargs["dropout_seed"] = int(torch.randint(2**62, ()))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    names = _names(op, args, kwargs)
    dtype = _dtype(leaves)
    cotangents: list[Tensor] = []
    found = _run(run, leaves, spec, names, cotangents, None)
    truth = _run(oracle, leaves, spec, names, cotangents, torch.float64)
    plain = None
    if dtype in (torch.float16, torch.bfloat16):
        plain = _run(oracle, leaves, spec, names, cotangents, dtype)
    slack = 2 * torch.finfo(torch.float32).eps * _largest_score(op, args, kwargs)
    gradients = [_largest(x) for name, x in truth.items() if name.startswith("d ")]
    rows = []
    for name, exact in truth.items():
        is_gradient = name.startswith("d ")
        least = LEAST_GRADIENT * max(gradients) if is_gradient else 0.0
        own, eps = found[name].dtype, torch.finfo(dtype).eps
        if plain is not None:
            allowed = 2 * _error(plain[name], exact, least) + 2 * eps
        else:
            allowed = (GRADIENT_BUDGET if is_gradient else FORWARD_BUDGET) + slack
            allowed *= eps / torch.finfo(torch.float32).eps
        if torch.finfo(own).eps > eps:  # a parameter kept in lower precision than query
            allowed += 2 * torch.finfo(own).eps
        rows.append(Row(name, _error(found[name], exact, least), allowed))
    if routed is not None:
        rows.append(routed.choice(args, kwargs, dtype, slack))
    return Report(op.__name__, dtype, tuple(rows))


class _Routed:
    """`routed_attention`, and what its results should be: given its own choice of blocks, because
    scores that differ by rounding may be chosen either way.
    """

    def __init__(self, op: Callable):
        self.op = op
        self.indices: Tensor | None = None

    def run(self, *args, **kwargs) -> Tensor:
        results = self.op(*args, **kwargs | {"return_routing": True})
        self.indices = results[-1].indices
        return results[0]

    def definition(self, *args, **kwargs) -> Tensor:
        given = self._given(args, kwargs)
        assert self.indices is not None
        options = {
            n: x for n, x in given.items() if n in _parameters(reference.block_topk_attention)
        }
        out = reference.block_topk_attention(**options, indices=self.indices)
        assert isinstance(out, Tensor)
        return out

    def choice(self, args, kwargs, dtype: torch.dtype, slack: float) -> Row:
        """Row of the choice, against float64 scores."""
        given, indices = self._given(args, kwargs), self.indices
        assert indices is not None
        exact = _scores(given, torch.float64)
        names = ("block_size", "near", "query_offset", "cu_seqlens")
        # all blocks that can be chosen, best first, then -1
        order = choose(
            exact, exact.shape[3], given["query"].shape[2], given["key"].shape[2],
            **{name: given[name] for name in names},
        ).long()  # fmt: skip
        there = order >= 0
        ranked = exact.gather(3, order.clamp(min=0)).masked_fill(~there, -math.inf)
        chosen = (order[..., None] == indices[..., None, :]).any(-1) & there
        worst = ranked.masked_fill(~chosen, math.inf).amin(-1) if order.numel() else ranked.sum(-1)
        best = ranked.masked_fill(chosen, -math.inf).amax(-1) if order.numel() else worst
        most = min(int(given["top_k"]), exact.shape[3])
        wanted = there.sum(-1).clamp(max=most)
        if not torch.equal(chosen.sum(-1), wanted) or not torch.equal(
            (indices >= 0).sum(-1), wanted
        ):
            return Row("choice", math.inf, 0.0)
        gap = torch.where((best > worst) & (wanted > 0), best - worst, 0.0)
        eps = torch.finfo(dtype).eps
        if dtype in (torch.float16, torch.bfloat16):
            allowed = 2 * _error(_scores(given, dtype), exact, 0.0) + 2 * eps
        else:
            allowed = (FORWARD_BUDGET + slack) * eps / torch.finfo(torch.float32).eps
        error = float(gap.max()) / (_largest(ranked) or 1.0) if gap.numel() else 0.0
        return Row("choice", error, allowed)

    def _given(self, args, kwargs) -> dict:
        bound = inspect.signature(self.op).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments


@torch.no_grad()
def _scores(given: dict, dtype: torch.dtype) -> Tensor:
    """The scores by which a call of `routed_attention` chooses, by the definition."""
    if given["scores"] is not None:
        return given["scores"].detach().to(dtype)
    options = {n: x for n, x in given.items() if n in _parameters(reference.block_scores)}
    for name in ("query", "key", "landmarks"):
        if options[name] is not None:
            options[name] = options[name].detach().to(dtype)
    return reference.block_scores(**options)


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _names(op: Callable, args, kwargs) -> list[str]:
    """A readable name for each leaf, from the signature of the operator."""
    bound = inspect.signature(op).bind(*args, **kwargs).arguments
    given = [*list(bound)[: len(args)], *kwargs]
    names = []
    for name, value in zip(given, (*args, *kwargs.values()), strict=True):
        count = len(pytree.tree_leaves(value))
        names += [name] if count == 1 else [f"{name}[{n}]" for n in range(count)]
    return names


def _dtype(leaves) -> torch.dtype:
    for leaf in leaves:
        if _differentiable(leaf):
            return leaf.dtype
    raise TypeError("args: expected at least one floating-point tensor, got none")


def _differentiable(leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _run(function, leaves, spec, names, cotangents, dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name. The first run fixes the cotangents."""
    inputs = [
        leaf.detach().to(dtype or leaf.dtype).requires_grad_() if _differentiable(leaf) else leaf
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(inputs, spec)
    outputs = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if _differentiable(x)]
    if not cotangents:
        cotangents += [torch.randn_like(out) for out in outputs]
    sources = [n for n, leaf in enumerate(inputs) if _differentiable(leaf)]
    connected = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    grads = torch.autograd.grad(
        [out for out, _ in connected],
        [inputs[n] for n in sources],
        [cotangent.to(out.dtype) for out, cotangent in connected],
        materialize_grads=True,
        allow_unused=True,
    )
    found = {f"out[{n}]" if n else "out": x.detach() for n, x in enumerate(outputs)}
    return found | {f"d {names[n]}": grad for n, grad in zip(sources, grads, strict=True)}


def _error(found: Tensor, exact: Tensor, least: float) -> float:
    """max |found - exact| / max(|exact|, least) of finite entries; inf where the others differ."""
    found, exact = found.double(), exact.double()
    finite = exact.isfinite()
    if found.shape != exact.shape or not torch.equal(found[~finite], exact[~finite]):
        return math.inf
    difference = (found - exact)[finite].abs()
    if difference.numel() == 0 or not difference.any():
        return 0.0
    return float(difference.max()) / (max(_largest(exact), least) or 1.0)


def _largest(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def _detached(x):
    return x.detach() if isinstance(x, Tensor) else x


def _largest_score(op: Callable, args, kwargs) -> float:
    """max |score| + max |bias|, which bounds what rounding an exponent must cost."""
    given = inspect.signature(op).bind(*args, **kwargs).arguments
    names = ("query", "key", "landmarks", "bias")
    query, key, landmarks, bias = pytree.tree_map(_detached, [given.get(name) for name in names])
    if query is None or key is None or not query.numel() or not key.numel():
        return 0.0
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale)
    if landmarks is None:
        pairs = [(query.unflatten(1, (key.shape[1], -1)).flatten(2, 3), key)]
    else:
        tilde_q, tilde_k = landmarks if isinstance(landmarks, tuple | list) else (landmarks,) * 2
        grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        pairs = [(grouped, tilde_k), (key, tilde_q)]
    products = ((a.double() @ b.double().transpose(-1, -2)).abs().max() for a, b in pairs)
    return scale * max(float(x) for x in products) + (0.0 if bias is None else _largest(bias))
