"""flashmark.check_causality: a test that no output depends on later tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# What the future of an input is replaced by. Queries and keys enter through scores, which a causal
# operator selects: they may become anything. A NaN value crosses any tiled product as 0 * NaN.
SCORED = (math.nan, math.inf, -math.inf, 1e4)
POISON = {"query": SCORED, "key": SCORED, "value": (1e30, -1e30)}
OTHER = (1e4, -1e4)  # inputs of a layer are values as well


@dataclasses.dataclass(frozen=True)
class Leak:
    """One way in which outputs up to `position` depended on later tokens."""

    input: str
    position: int
    poison: float | str  # what replaced the future; "gradient" where one into the future was not 0
    size: float  # largest change of an output, or the largest such gradient; NaN counts

    def __str__(self) -> str:
        if self.poison == "gradient":
            what = f"have gradients of {self.size:.1e} to later {self.input}"
        else:
            what = f"move by {self.size:.1e} when later {self.input} = {self.poison}"
        return f"outputs up to {self.position} {what}"


@dataclasses.dataclass(frozen=True)
class CausalityReport:
    """Result of `check_causality`. True if nothing leaks."""

    leaks: tuple[Leak, ...]
    probes: int

    @property
    def ok(self) -> bool:
        return not self.leaks

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"causal: {self.probes} probes, the past kept its bits in all of them"
        # the first of each kind
        ways = {(leak.input, leak.poison): leak for leak in reversed(self.leaks)}
        shown = [f"  {leak}" for leak in reversed(ways.values())]
        return "\n".join(
            [f"NOT CAUSAL: {len(self.leaks)} of {self.probes} probes found a leak", *shown]
        )


def check_causality(
    function: Callable[..., Tensor],
    *,
    positions: Sequence[int] | None = None,
    gradients: bool = True,
    **inputs: Tensor,
) -> CausalityReport:
    """Replace later tokens by poison, and check that no bit of an earlier output changes.

    Args:
        function: called as `function(**inputs)`; returns a tensor whose dimension -2 is the
            sequence, or a tuple that starts with it. Bind other arguments with `functools.partial`
            or a lambda.
        positions: after which tokens the future begins; a spread of up to 8 when None.
        gradients: also differentiate outputs up to each position: gradients of floating-point
            inputs after it have to be exactly 0.
        inputs: by name. "query" and "key" become NaN, inf, -inf and 1e4, "value" becomes +-1e30,
            other floating-point tensors +-1e4; their dimension -2 is the sequence. Integer tensors
            (B, N) are tokens, and are exchanged for other tokens that occur.

    Returns:
        CausalityReport: true if all outputs kept their bits (NaN counts as moved).

    Raises:
        ValueError: no input, or inputs and output of different lengths.

    A model must be in eval mode: dropout moves outputs as well. A finite number of probes can miss
    a leak, it cannot invent one.
    """
    length = _length(inputs)
    clean = _output(function, inputs, length)
    if positions is None:
        positions = _spread(length)
    leaks: list[Leak] = []
    probes = 0
    for position in positions:
        past = slice(0, position + 1)
        for name, poison, changed in _poisoned(inputs, position):
            moved = _output(function, inputs | {name: changed}, length)
            size = _difference(moved[..., past, :], clean[..., past, :])
            probes += 1
            if size != 0.0:
                leaks.append(Leak(name, position, poison, size))
        if gradients and position + 1 < length:
            for name, grad in _gradients(function, inputs, past).items():
                size = _difference(grad[..., position + 1 :, :], torch.zeros(()))
                probes += 1
                if size != 0.0:
                    leaks.append(Leak(name, position, "gradient", size))
    return CausalityReport(tuple(leaks), probes)


def _length(inputs: dict[str, Tensor]) -> int:
    if not inputs:
        raise ValueError("inputs: expected at least one tensor by name, got none")
    lengths = {x.shape[_dimension(x)] for x in inputs.values()}
    if len(lengths) != 1:
        raise ValueError(f"inputs: expected one sequence length, got {sorted(lengths)}")
    return lengths.pop()


def _dimension(x: Tensor) -> int:
    return -2 if x.is_floating_point() else -1


def _spread(length: int) -> list[int]:
    """First and last, around the middle (where chunks often end), and some between."""
    half = length // 2
    wanted = {0, 1, half // 2, half - 1, half, half + half // 2 + 1, length - 3, length - 2}
    return sorted(n for n in wanted if 0 <= n < length - 1)


@torch.no_grad()
def _output(function, inputs: dict[str, Tensor], length: int) -> Tensor:
    out = function(**{name: x.detach() for name, x in inputs.items()})
    out = out[0] if isinstance(out, tuple) else out
    if out.dim() < 2 or out.shape[-2] != length:
        raise ValueError(
            f"function: expected an output of length {length} in dimension -2, "
            f"got shape {tuple(out.shape)}"
        )
    return out


def _poisoned(
    inputs: dict[str, Tensor], position: int
) -> Iterator[tuple[str, float | str, Tensor]]:
    """(input, poison, the input with its future replaced), one input at a time."""
    for name, x in inputs.items():
        changed = x.detach().clone()
        if not x.is_floating_point():
            changed[..., position + 1 :] = x.amax() + x.amin() - changed[..., position + 1 :]
            yield name, "other tokens", changed
            continue
        for poison in POISON.get(name, OTHER):
            changed = changed.clone()
            changed[..., position + 1 :, :] = _fitting(poison, x)
            yield name, poison, changed


def _fitting(poison: float, x: Tensor) -> float:
    """The largest of the dtype where the poison would overflow by accident."""
    if not math.isfinite(poison):
        return poison
    return math.copysign(min(abs(poison), torch.finfo(x.dtype).max), poison)


def _gradients(function, inputs: dict[str, Tensor], past: slice) -> dict[str, Tensor]:
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    sources = {name: x for name, x in leaves.items() if x.is_floating_point()}
    if not sources:
        return {}
    with torch.enable_grad():
        out = function(**leaves)
        out = (out[0] if isinstance(out, tuple) else out)[..., past, :]
        # squares, not a plain sum: weights that sum to 1 would have no gradient
        grads = torch.autograd.grad(
            out.square().sum(), list(sources.values()), materialize_grads=True, allow_unused=True
        )
    return dict(zip(sources, grads, strict=True))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest |found - expected|; 0.0 only for the same bits, NaN where either has one."""
    if torch.equal(found, expected.expand_as(found)):
        return 0.0
    size = float((found - expected).abs().max())
    return size or math.nan
