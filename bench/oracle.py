"""Check at full size: dense float64 attention for some rows of a work, from the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers import Attention, Work

ROWS = 128
# largest relative error in float32: forward, gradients
FLOAT32_BUDGET = (1e-5, 5e-5)


class Oracle:
    """Expected results of a work whose loss reads one random query of each of 128 stretches.

    Those rows decide dq, dk and dv completely, and every block of queries and keys takes part, for
    the price of 128 x N scores. Low precision may have twice the error of plain PyTorch in the
    same dtype plus two roundings.
    """

    def __init__(self, work: Work):
        self.work, self.inputs = work, work.inputs()
        count = min(ROWS, work.n)
        generator = torch.Generator().manual_seed(1)
        edges = torch.linspace(0, work.n, count + 1).long()
        inside = torch.rand(count, generator=generator) * (edges[1:] - edges[:-1])
        self.rows = (edges[:-1] + inside.long()).to(work.device)
        shape = (work.batch, work.heads, work.n, work.dim)
        self.dout = torch.zeros(shape, dtype=work.dtype, device=work.device)
        self.dout[:, :, self.rows] = torch.randn(
            (*shape[:2], count, work.dim), generator=generator
        ).to(self.dout)
        self.expected = self._dense(torch.float64)
        self.budgets = self._budgets()

    def errors(self, attention: Attention) -> dict[str, tuple[float, float]]:
        """(largest error relative to the largest entry, allowed error) of each result."""
        if not self.work.backward:
            with torch.no_grad():
                results = {"out": attention(*self.inputs)[:, :, self.rows]}
        else:
            out = attention(*self.inputs)
            grads = torch.autograd.grad(out, self.inputs, self.dout)
            results = {"out": out.detach()[:, :, self.rows]}
            results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return {
            name: (relative_error(result, self.expected[name]), self.budgets[name])
            for name, result in results.items()
        }

    def _budgets(self) -> dict[str, float]:
        forward, backward = FLOAT32_BUDGET
        budgets = {name: forward if name == "out" else backward for name in self.expected}
        if self.work.dtype not in (torch.float32, torch.float64):
            unit = torch.finfo(self.work.dtype).eps / 2
            plain = self._dense(self.work.dtype)
            for name in budgets:
                budgets[name] = 2 * relative_error(plain[name], self.expected[name]) + 2 * unit
        return budgets

    def _dense(self, dtype: torch.dtype) -> dict[str, Tensor]:
        work, rows = self.work, self.rows
        query, key, value = (
            x.detach().to(dtype).requires_grad_(work.backward) for x in self.inputs
        )
        zero = torch.zeros((), dtype=torch.long, device=work.device)
        keys = torch.arange(work.n, device=work.device)
        visible = work.pattern.formula(zero, zero, rows[:, None], keys)
        scores = query[:, :, rows] @ key.mT * work.dim**-0.5
        out = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value
        results = {"out": out.detach()}
        if work.backward:
            dout = self.dout[:, :, rows].to(dtype)
            grads = torch.autograd.grad(out, (query, key, value), dout)
            results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return results


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max |result - expected| / max |expected|; infinite where the result has NaN or infinity."""
    result, expected = result.double(), expected.double()
    if not result.isfinite().all():
        return float("inf")
    return ((result - expected).abs().max() / expected.abs().max()).item()
