"""Calls of block-sparse attention that together reach every config of the tuned block sizes."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from flashmark import masks
from flashmark.block_sparse.call import Call, Grads, Saved
from flashmark.kernels import block_sparse
from flashmark.kernels.block_sparse import configs

HALF, SINGLE = torch.bfloat16, torch.float32
Q_LEN, HEADS = 1024, 4


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call. `pass_` is one of PASSES, or "one-pass-ungrouped"."""

    pass_: str
    dim: int
    block: int | None = None  # None: causal, by comparison
    feature: str = "plain"  # or "relative", "dense", "dropout", "softcap", "lengths"
    dtype: torch.dtype = HALF
    precision: str = "highest"  # of float32 products

    def __str__(self) -> str:
        kind = "causal" if self.block is None else f"block{self.block}"
        dtype = "bf16" if self.dtype == HALF else "tf32" if self.precision == "high" else "fp32"
        return f"{self.pass_}-{dtype}-D{self.dim}-{kind}-{self.feature}"

    def run(self) -> None:
        """Call the launcher on CPU tensors."""
        grouped = self.pass_ in ("two-pass-grouped", "one-pass", "decode")
        query = torch.zeros(1, HEADS, Q_LEN, self.dim, dtype=self.dtype)
        key = torch.zeros(1, 2 if grouped else HEADS, Q_LEN, self.dim, dtype=self.dtype)
        expression = masks.causal() if self.block is None else masks.sliding_window(300)
        size = self.block or 128
        mask = masks.compile_mask(expression, 1, 1, Q_LEN, Q_LEN, device="cpu", block_size=size)
        bias = seed = offset = lengths = None
        if self.feature == "relative":
            bias = torch.zeros(HEADS, 2 * Q_LEN - 1)
        elif self.feature == "dense":
            bias = torch.zeros(1, HEADS, 1 if self.pass_ == "decode" else Q_LEN, Q_LEN)
        elif self.feature == "dropout":
            seed = torch.zeros(1, dtype=torch.int64)
        elif self.feature == "lengths":
            lengths = torch.full((1,), Q_LEN, dtype=torch.int32)
        if self.pass_ == "decode":
            query, offset = query[:, :, :1], torch.zeros(1, dtype=torch.int32)
        call = Call(
            query, key, key, mask, 0.125, bias=bias, query_offset=offset, kv_lengths=lengths,
            dropout_seed=seed,
            softcap=30.0 if self.feature == "softcap" else 0.0,
            dropout_p=0.0 if seed is None else 0.1,
            deterministic=not self.pass_.startswith("one-pass"),
        )  # fmt: skip
        plain = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            with configs.pointer_forms():  # Hopper's forms have launches of their own
                self._call(call)
        finally:
            torch.set_float32_matmul_precision(plain)

    def _call(self, call: Call) -> None:
        if self.pass_ in ("forward", "decode"):
            block_sparse.forward(call)
        elif self.pass_ == "jvp":
            block_sparse.jvp(call, Grads(call.query, call.key, call.value, call.bias, None))
        else:
            lse = torch.zeros(1, HEADS, Q_LEN)
            residual = lse.new_zeros(0) if call.bias is None else torch.zeros_like(lse)
            block_sparse.backward(call, Saved(call.query, lse, residual), call.query, None)


PASSES = ("forward", "jvp", "two-pass", "two-pass-grouped", "one-pass", "decode")
FEATURES = ("relative", "dense", "dropout", "softcap")
SOME = ("plain", "relative")  # features of forward mode's launches


def all_launches() -> list[Launch]:
    """Every config for half precision up to D = 128, and a few of everything else."""
    product = itertools.product
    launches = [
        *(Launch(p, d, b) for p, d, b in product(PASSES, (64, 128), (None, 128, 64))),
        *(Launch(p, d, 128, f) for p, d, f in product(PASSES, (64, 128), FEATURES)),
        *(Launch(p, d, 64, "relative") for p, d in product(PASSES, (64, 128))),
        *(Launch(p, 128, b) for p, b in product(PASSES, (32, 16))),
        *(Launch(p, d) for p, d in product(PASSES, (32, 256))),
        *(Launch(p, 256, 128, "relative") for p in PASSES),
        *(Launch(p, d, 128, dtype=SINGLE) for p, d in product(PASSES, (64, 128))),
        *(Launch(p, d, 128, "plain", SINGLE, "high") for p, d in product(PASSES, (64, 128))),
    ]
    return [x for x in launches if x.pass_ != "jvp" or x.block is not None and x.feature in SOME]
