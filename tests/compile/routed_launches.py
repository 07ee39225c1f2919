"""Calls of attention over chosen blocks that together reach every config."""

from __future__ import annotations

import dataclasses

import torch

from flashmark.kernels import routed
from flashmark.routed.call import Call, Saved

HALF, SINGLE = torch.bfloat16, torch.float32
Q_LEN, HEADS, KV_HEADS, TOP = 2048, 8, 2, 16


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call. `pass_`: "forward", "backward", "atomic" or "decode"."""

    pass_: str
    dim: int
    block: int = 64
    feature: str = "plain"  # or "softcap", "mask", "packed", "lengths"
    dtype: torch.dtype = HALF
    precision: str = "highest"  # of float32 products

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype == HALF else "tf32" if self.precision == "high" else "fp32"
        return f"routed-{self.pass_}-{dtype}-D{self.dim}-block{self.block}-{self.feature}"

    def run(self) -> None:
        """Call the launcher on CPU tensors."""
        rows = 1 if self.pass_ == "decode" else Q_LEN
        query = torch.zeros(1, HEADS, rows, self.dim, dtype=self.dtype)
        key = torch.zeros(1, KV_HEADS, Q_LEN, self.dim, dtype=self.dtype)
        keep = starts = lengths = offset = None
        if self.feature == "mask":
            keep = torch.ones(1, Q_LEN, dtype=torch.bool)
        elif self.feature == "packed":
            starts = torch.zeros(Q_LEN, dtype=torch.int32)
        elif self.feature == "lengths":
            offset = torch.zeros(1, dtype=torch.int32)
            lengths = torch.full((1,), Q_LEN, dtype=torch.int32)
        call = Call(
            query, key, key, torch.zeros(1, KV_HEADS, rows, TOP, dtype=torch.int32), self.block, 1,
            0.125, None, offset, lengths, keep, starts,
            30.0 if self.feature == "softcap" else 0.0, self.pass_ != "atomic",
        )  # fmt: skip
        plain = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            if self.pass_ in ("forward", "decode"):
                routed.forward(call)
            else:
                routed.backward(call, Saved(query, torch.zeros(1, HEADS, rows)), query, None)
        finally:
            torch.set_float32_matmul_precision(plain)

    def spill_allowed(self, kernel: str) -> int:
        """Bytes to a thread."""
        return SPILLS.get((str(self), kernel), 0)


# bytes to a thread that kernels spill; they may only get fewer
SPILLS: dict[tuple[str, str], int] = {
    ("routed-backward-bf16-D64-block64-plain", "gathered_keys_kernel"): 16,
    ("routed-backward-bf16-D128-block64-plain", "gathered_keys_kernel"): 16,
}


def all_launches() -> list[Launch]:
    """Every config for half precision up to D = 128, and a few of everything else."""
    return [
        *(Launch(p, d) for p in ("forward", "backward", "atomic", "decode") for d in (64, 128)),
        *(Launch(p, 256) for p in ("forward", "backward", "decode")),
        *(Launch(p, 128, 16) for p in ("forward", "backward")),
        Launch("backward", 64, 100),
        *(Launch(p, 64, 64, "softcap") for p in ("forward", "backward", "decode")),
        *(Launch(p, 64, 64, f) for p in ("forward", "backward") for f in ("mask", "packed")),
        *(Launch(p, 64, 64, "lengths") for p in ("forward", "backward", "decode")),
        *(Launch(p, 64, dtype=SINGLE) for p in ("forward", "backward", "decode")),
        Launch("backward", 64, dtype=SINGLE, precision="high"),
    ]
