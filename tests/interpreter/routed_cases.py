"""A call of attention over chosen blocks as data, run by the Triton kernels and the reference."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from flashmark import reference
from flashmark.kernels import routed
from flashmark.routed.call import Call as RoutedCall
from flashmark.routed.places import starts_of
from tests.helpers import poisoned, relative_error
from tests.interpreter.attention_cases import ROUNDING


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and features of a call."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    q_len: int = 40
    kv_len: int | None = None
    dim: int = 16
    v_dim: int | None = None
    block: int = 8
    top_k: int = 2
    near: int = 1
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    softcap: float = 0.0
    scale: float | None = None
    query_offset: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    masked: float = 0.0  # share of the keys that key_mask takes away
    bounds: tuple[int, ...] | None = None  # cu_seqlens
    popular: bool = False  # all queries choose the first block
    layout: str = "contiguous"
    lse_gradient: bool = True

    def __str__(self) -> str:
        default = Case()
        names = [field.name for field in dataclasses.fields(self)]
        said = [n for n in names if getattr(self, n) != getattr(default, n)]
        return "-".join(f"{n}={getattr(self, n)}".replace("torch.", "") for n in said) or "plain"


class Call:
    """The tensors of a case. Everything past a sample's keys, and keys that are masked, is NaN."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        kv_len, v_dim = case.kv_len or case.q_len, case.v_dim or case.dim
        self.scale = 1 / math.sqrt(case.dim) if case.scale is None else case.scale
        draw = torch.Generator().manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        def place(tensor: Tensor, layout: str = case.layout) -> Tensor:
            return poisoned(tensor.to(device), layout=layout)

        self.query = place(randn(case.batch, case.heads, case.q_len, case.dim))
        self.key = place(randn(case.batch, case.kv_heads, kv_len, case.dim))
        self.value = place(randn(case.batch, case.kv_heads, kv_len, v_dim))
        self.sinks = self.offset = self.lengths = self.mask = self.bounds = self.starts = None
        if case.kv_lengths is not None:
            for sample, length in enumerate(case.kv_lengths):
                self.key[sample, :, length:] = math.nan
                self.value[sample, :, length:] = math.nan
            self.lengths = torch.tensor(case.kv_lengths, dtype=torch.int32, device=device)
        if case.masked:
            self.mask = (torch.rand(case.batch, kv_len, generator=draw) >= case.masked).to(device)
            for x in (self.key, self.value):
                x.masked_fill_(~self.mask[:, None, :, None], math.nan)
        if case.sinks:
            self.sinks = place(randn(case.heads, dtype=torch.float32), "contiguous")
        if case.query_offset is not None:
            self.offset = torch.tensor(case.query_offset, dtype=torch.int32, device=device)
        if case.bounds is not None:
            self.bounds = torch.tensor(case.bounds, dtype=torch.int32, device=device)
            self.starts = starts_of(self.bounds, kv_len)
        self.indices = self._choices(kv_len, draw).to(device)
        self.dout = place(randn(case.batch, case.heads, case.q_len, v_dim))
        self.dlse = None
        if case.lse_gradient:
            self.dlse = place(randn(*self.dout.shape[:3], dtype=torch.float32), "contiguous")

    def _choices(self, kv_len: int, draw: torch.Generator) -> Tensor:
        """Random blocks, each at most once, in any order, with -1 and blocks out of range between.

        Beyond a CPU nobody looks at them, so the kernels see what users may give.
        """
        case = self.case
        blocks = -(-kv_len // case.block)
        weight = torch.rand(
            case.batch, case.kv_heads, case.q_len, blocks + case.top_k, generator=draw
        )
        if case.popular:
            weight[..., 0] = 2.0
        chosen = weight.topk(case.top_k, -1).indices
        chosen = torch.where(chosen == blocks, -1, chosen)
        return torch.where(chosen > blocks, 2**31 - 1, chosen).to(torch.int32)

    def checked(self, deterministic: bool = True) -> RoutedCall:
        case = self.case
        return RoutedCall(
            self.query, self.key, self.value, self.indices, case.block, case.near, self.scale,
            self.sinks, self.offset, self.lengths, self.mask, self.starts, case.softcap,
            deterministic,
        )  # fmt: skip

    def reference(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Outputs and gradients by the definition, computed in `dtype`."""
        tensors = {n: getattr(self, n) for n in ("query", "key", "value", "sinks")}
        leaves = {
            n: t.to(dtype).masked_fill(t.isnan(), 0.0).requires_grad_()
            for n, t in tensors.items()
            if t is not None
        }
        case = self.case
        out, lse = reference.block_topk_attention(
            **leaves, indices=self.indices, block_size=case.block, near=case.near,
            scale=self.scale, softcap=case.softcap, query_offset=self.offset,
            kv_lengths=self.lengths, key_mask=self.mask, cu_seqlens=self.bounds, return_lse=True,
        )  # fmt: skip
        loss = (out * self.dout.to(dtype)).sum()
        if self.dlse is not None:
            finite = lse.isfinite()
            loss = loss + (lse[finite] * self.dlse.to(lse.dtype)[finite]).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        named = {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def budget(self, expected: dict[str, Tensor]) -> dict[str, float]:
        """Allowed relative error: 1e-5 and 5e-5 in float32, else from what plain PyTorch reaches in
        that dtype.
        """
        dtype = self.case.dtype
        if dtype == torch.float32:
            return {n: 5e-5 if n.startswith("d ") else 1e-5 for n in expected}
        plain = self.reference(dtype)
        return {
            n: 2 * relative_error(plain[n], expected[n]) + 4 * ROUNDING[dtype] for n in expected
        }


def run(call: Call, deterministic: bool = True) -> dict[str, Tensor]:
    """Outputs and gradients of the kernels, without what has no gradient."""
    checked = call.checked(deterministic)
    saved = routed.forward(checked)
    grads = routed.backward(checked, saved, call.dout, call.dlse)
    named = zip(("query", "key", "value", "sinks"), grads, strict=True)
    return saved._asdict() | {f"d {n}": g for n, g in named if g is not None}


def check(case: Case, device: torch.device, *, modes=(True, False)) -> None:
    """Forward and backward of the kernels are as close to the reference as they should be."""
    call = Call(case, device)
    expected = call.reference()
    budget = call.budget(expected)
    for deterministic in modes:
        got = run(call, deterministic)
        assert got["out"].dtype == case.dtype and got["lse"].dtype == torch.float32
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            error = relative_error(tensor, expected[name])
            assert error <= budget[name], (
                f"{name}, {deterministic=}: error {error:.2e}, allowed {budget[name]:.2e}"
            )
