"""A call of block-sparse attention as data, run by the Triton kernels and by the reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
import torch._decomp.decompositions_for_jvp  # compiles functions, before tests replace some
from torch import Tensor

from flashmark import masks, reference
from flashmark.block_sparse.call import Call as SparseCall
from flashmark.block_sparse.call import Grads, Saved
from flashmark.kernels import block_sparse
from tests.helpers import poisoned, relative_error

NAMES = ("query", "key", "value", "bias", "sinks")
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, features and mask of a call. `bias` and `rows` as in `block_sparse_attention`."""

    mask: masks.Mask | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    q_len: int = 70
    kv_len: int | None = None
    dim: int = 16
    v_dim: int | None = None
    block: int | tuple[int, int] = 32
    dtype: torch.dtype = torch.float32
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype = torch.float32
    sinks: bool = False
    query_offset: tuple[int, ...] | None = None
    rows: int | None = None
    kv_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    softcap: float = 0.0
    scale: float | None = None
    layout: str = "contiguous"
    lse_gradient: bool = True

    def __str__(self) -> str:
        default = Case()
        names = [f.name for f in dataclasses.fields(self)]
        said = [n for n in names if getattr(self, n) != getattr(default, n) and n != "mask"]
        return "-".join(f"{n}={getattr(self, n)}".replace("torch.", "") for n in said) or "plain"


class Call:
    """The tensors of a case. Everything past a sample's keys is NaN."""

    def __init__(self, case: Case, device: torch.device, *, magnitude: float = 1.0):
        self.case, self.device = case, device
        kv_heads, kv_len = case.kv_heads or case.heads, case.kv_len or case.q_len
        v_dim, rows = case.v_dim or case.dim, case.rows or case.q_len
        self.scale = case.scale or 1 / math.sqrt(case.dim)
        draw = torch.Generator().manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        def place(tensor: Tensor, layout: str = case.layout) -> Tensor:
            return poisoned(tensor.to(device), layout=layout)

        self.query = place(randn(case.batch, case.heads, case.q_len, case.dim) * magnitude)
        self.key = place(randn(case.batch, kv_heads, kv_len, case.dim))
        self.value = place(randn(case.batch, kv_heads, kv_len, v_dim))
        if case.kv_lengths is not None:
            for sample, length in enumerate(case.kv_lengths):
                self.key[sample, :, length:] = float("nan")
                self.value[sample, :, length:] = float("nan")
        self.bias = self.sinks = self.seed = self.offset = self.lengths = None
        if case.bias is not None:
            self.bias = place(randn(*case.bias, dtype=case.bias_dtype), "contiguous")
        if case.sinks:
            self.sinks = place(randn(case.heads, dtype=torch.float32), "contiguous")
        if case.query_offset is not None:
            self.offset = torch.tensor(case.query_offset, dtype=torch.int32, device=device)
        if case.kv_lengths is not None:
            self.lengths = torch.tensor(case.kv_lengths, dtype=torch.int32, device=device)
        if case.dropout_p:
            self.seed = torch.tensor([-0x123456789ABCDEF], device=device)
        self.dout = place(randn(case.batch, case.heads, case.q_len, v_dim))
        self.dlse = None
        if case.lse_gradient:
            self.dlse = place(randn(*self.dout.shape[:3], dtype=torch.float32), "contiguous")
        shape = (case.batch, case.heads, rows, kv_len)
        self.mask = masks.compile_mask(case.mask, *shape, device=device, block_size=case.block)

    def checked(self, deterministic: bool = True) -> SparseCall:
        return SparseCall(
            self.query, self.key, self.value, self.mask, self.scale, self.bias, self.sinks,
            self.offset, self.lengths, self.seed, self.case.softcap, self.case.dropout_p,
            deterministic,
        )  # fmt: skip

    def forward(self, module=block_sparse) -> tuple[Tensor, Tensor]:
        return module.forward(self.checked())[:2]

    def backward(self, out: Tensor, lse: Tensor, deterministic: bool, module=block_sparse):
        """{"d query": ..., ...}, without what has no gradient."""
        saved = Saved(out, lse, lse.new_zeros(0 if self.bias is None else lse.shape))
        grads = module.backward(self.checked(deterministic), saved, self.dout, self.dlse)
        return {f"d {n}": g for n, g in zip(NAMES, grads, strict=True) if g is not None}

    def directions(self, only: Iterable[str] = NAMES) -> Grads:
        """A tangent for each tensor in `only`, NaN where the tensor is."""
        draw = torch.Generator().manual_seed(1)

        def of(name: str) -> Tensor | None:
            x = getattr(self, name)
            if x is None or name not in only:
                return None
            tangent = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
            return tangent.to(x.device).masked_fill(x.isnan(), float("nan"))

        return Grads(*map(of, NAMES))

    def jvp(self, tangents: Grads) -> dict[str, Tensor]:
        """Outputs and their tangents."""
        saved, others = block_sparse.jvp(self.checked(), tangents)
        return dict(zip(("out", "lse", "d out", "d lse"), (*saved[:2], *others), strict=True))

    def reference_jvp(self, tangents: Grads, dtype: torch.dtype = torch.float64):
        """`jvp` by the definition, computed in `dtype`."""
        given = self._tensors(dtype)
        along = {n: x for n, x in zip(NAMES, tangents, strict=True) if x is not None}

        def outputs(*some: Tensor) -> tuple[Tensor, Tensor]:
            return self._by_definition(given | dict(zip(along, some, strict=True)))

        primals = tuple(given[n] for n in along)
        pairs = torch.func.jvp(
            outputs, primals, tuple(x.nan_to_num(0.0).to(dtype) for x in along.values())
        )
        return dict(zip(("out", "lse", "d out", "d lse"), (*pairs[0], *pairs[1]), strict=True))

    def _tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {n: getattr(self, n) for n in NAMES}
        return {
            n: t.to(dtype).masked_fill(t.isnan(), 0.0) for n, t in tensors.items() if t is not None
        }

    def _by_definition(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        case = self.case
        return reference.block_sparse_attention(
            **tensors,
            mask=self.mask,
            query_offset=self.offset,
            kv_lengths=self.lengths,
            dropout_p=case.dropout_p,
            dropout_seed=self.seed,
            softcap=case.softcap or None,
            scale=self.scale,
            return_lse=True,
        )

    def reference(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Outputs and gradients by the definition, computed in `dtype`."""
        leaves = {n: t.requires_grad_() for n, t in self._tensors(dtype).items()}
        out, lse = self._by_definition(leaves)
        loss = (out * self.dout.to(dtype)).sum()
        if self.dlse is not None:
            finite = lse.isfinite()
            loss = loss + (lse[finite] * self.dlse.to(lse.dtype)[finite]).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        named = {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def budget(
        self, expected: dict[str, Tensor], plain: dict[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Allowed relative error: 1e-5 and 5e-5 in float32, else from what plain PyTorch reaches in
        that dtype, `plain`.
        """
        dtype = self.case.dtype
        if dtype == torch.float32:
            largest = expected["lse"].masked_fill(expected["lse"].isinf(), 0.0).abs().max()
            slack = 4 * ROUNDING[dtype] * float(largest)
            return {n: (5e-5 if n.startswith("d ") else 1e-5) + slack for n in expected}
        plain = self.reference(dtype) if plain is None else plain
        return {
            n: 2 * relative_error(plain[n], expected[n]) + 4 * ROUNDING[dtype] for n in expected
        }


def check(case: Case, device: torch.device, *, modes=(True, False), magnitude: float = 1.0) -> None:
    """Forward and backward of the kernels are as close to the reference as they should be."""
    call = Call(case, device, magnitude=magnitude)
    expected = call.reference()
    budget = call.budget(expected)
    out, lse = call.forward()
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    got = {"out": out, "lse": lse}
    for deterministic in modes:
        got |= call.backward(out, lse, deterministic)
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            error = relative_error(tensor, expected[name])
            assert error <= budget[name], (
                f"{name}, {deterministic=}: error {error:.2e}, allowed {budget[name]:.2e}"
            )
