"""The contenders: every flashmark backend that can run here, and PyTorch's own attention.

A contender is prepared once, outside the clock (masks compiled, FlexAttention compiled), and gives
a function of (query, key, value). One that cannot run raises `Unavailable`; the CSV has the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flashmark
from bench.patterns import Pattern

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """This contender cannot do this work here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Attention of (batch, heads, n, dim) under a pattern, with or without its backward."""

    pattern: Pattern
    batch: int
    heads: int
    n: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    backward: bool
    block_size: int = 128  # of our masks
    landmarks: int = 64

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def columns(self, suite: str, case: str) -> dict[str, object]:
        """Columns that identify this work in the CSV."""
        return {
            "suite": suite,
            "case": case,
            "batch": self.batch,
            "heads": self.heads,
            "n": self.n,
            "dim": self.dim,
            "dtype": dtype_name(self.dtype),
            "direction": self.direction,
        }

    def title(self, case: str) -> str:
        return f"{case}, N={self.n}, D={self.dim}, {dtype_name(self.dtype)}, {self.direction}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.batch, self.heads, self.n, self.dim)
        make = dict(generator=generator, device=self.device, dtype=torch.float32)
        return tuple(
            torch.randn(shape, **make).to(self.dtype).requires_grad_(self.backward)
            for _ in range(3)
        )


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    prepare: Callable[[Work], Attention]
    masked: bool = True  # False: plain causal attention, all there is without a mask library

    def follows(self, pattern: Pattern) -> bool:
        """Whether it computes the pattern's attention."""
        return self.masked or pattern.name == "causal"


def ours(backend: str) -> Contender:
    def prepare(work: Work) -> Attention:
        mask = flashmark.compile_mask(
            work.pattern.mask, work.batch, work.heads, work.n, work.n, device=work.device,
            block_size=work.block_size,
        )  # fmt: skip
        probe = torch.empty(1, 1, 1, work.dim, dtype=work.dtype, device=work.device)
        flashmark.block_sparse_attention(probe, probe, probe, backend=backend)  # or it says why not
        return lambda q, k, v: flashmark.block_sparse_attention(q, k, v, mask, backend=backend)

    return Contender(f"flashmark {backend}", prepare)


def pointers() -> Contender:
    """Our kernels with the forward kernel's form for any GPU."""

    def prepare(work: Work) -> Attention:
        from flashmark.kernels.block_sparse import configs

        attention = ours("triton").prepare(work)
        arch, block = configs.device_arch(work.device), (work.block_size,) * 2
        config = configs.choose(arch, work.dtype, work.dim, block, "forward")

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with configs.using(forward=config):
                return attention(q, k, v)

        return run

    return Contender("flashmark pointers", prepare)


def sdpa(kind: SDPBackend | None = None) -> Contender:
    """`scaled_dot_product_attention(is_causal=True)`, PyTorch's attention without a mask."""

    def prepare(work: Work) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind) if kind else contextlib.nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        if kind:
            probe = torch.zeros(1, 1, 128, work.dim, dtype=work.dtype, device=work.device)
            try:
                attention(probe, probe, probe)
            except RuntimeError as error:
                raise Unavailable(first_line(error)) from error
        return attention

    names = {
        None: "",
        SDPBackend.CUDNN_ATTENTION: " cudnn",
        SDPBackend.FLASH_ATTENTION: " flash",
        SDPBackend.EFFICIENT_ATTENTION: " efficient",
    }
    return Contender(f"sdpa causal{names[kind]}", prepare, masked=False)


def flex(
    name: str = "flex compiled", mode: str | None = None, kernel_options: dict | None = None
) -> Contender:
    """FlexAttention, compiled (`mode` as torch.compile's), with its own block mask."""

    def prepare(work: Work) -> Attention:
        if work.backward and work.device.type == "cpu":
            raise Unavailable("FlexAttention has no backward on CPU")
        torch.compiler.reset()  # or a few shapes later the compiler gives up and runs it unfused
        compiled = torch.compile(
            functools.partial(flex_attention, kernel_options=kernel_options),
            fullgraph=True, dynamic=False, mode=mode,
        )  # fmt: skip
        mask = create_block_mask(
            work.pattern.formula, None, None, work.n, work.n, device=work.device
        )
        try:
            compiled(*work.inputs(), block_mask=mask)
        except Exception as error:  # the compiler's errors share no base class
            raise Unavailable(first_line(error)) from error
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    return Contender(name, prepare)


def flash_sparse() -> Contender:
    """flash-sparse-attn's dense attention, which has causal rows, windows and first keys."""

    def prepare(work: Work) -> Attention:
        if work.pattern.near is None:
            raise Unavailable("it has windows and first keys, no other masks")
        try:
            from flash_sparse_attn import flash_dense_attn_func
        except Exception as error:  # built for another Triton, or without triton_kernels
            raise Unavailable(first_line(error)) from error
        sink, size = work.pattern.near
        options = {"is_causal": True}
        if size < work.n:  # a line a head: first keys, a band further left, a gap, the window
            columns = torch.tensor([[sink, 0, 0, size]], dtype=torch.int32, device=work.device)
            options["window_sizes"] = columns.expand(work.heads, 4).contiguous()

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            return flash_dense_attn_func(q, k, v, **options).transpose(1, 2)

        try:
            attention(*work.inputs())
        except Exception as error:  # its kernels may not compile here
            raise Unavailable(first_line(error)) from error
        return attention

    return Contender("flash-sparse-attn", prepare)


def tuned_contenders() -> list[Contender]:
    """Ours, and FlexAttention at its best on a GPU."""
    return [
        ours("triton"),
        flex("flex max-autotune", mode="max-autotune-no-cudagraphs"),
        flex("flex flash", kernel_options={"BACKEND": "FLASH"}),
    ]


def contenders(device: torch.device, with_flex: bool = True) -> list[Contender]:
    """Everything that computes attention under a mask on a device."""
    flexes = [flex()] if with_flex else []
    if device.type == "cuda":
        kinds = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
        others = [*(sdpa(getattr(SDPBackend, kind)) for kind in kinds), *flexes, flash_sparse()]
        return [ours("triton"), *others]
    return [ours("eager"), ours("cpu"), sdpa(), *flexes]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
