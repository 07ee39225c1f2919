"""Calls of attention over chosen blocks that together reach every config."""

from __future__ import annotations

import dataclasses

import torch

from flashmark.kernels import routed
from flashmark.routed.call import Call, Saved

HALF = torch.bfloat16
Q_LEN, HEADS, KV_HEADS, TOP = 2048, 8, 2, 16


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call. `pass_`: "forward", "backward", "atomic" or "decode"."""

    pass_: str
    dim: int
    block: int = 64
    feature: str = "plain"  # or "softcap", "mask", "packed", "lengths"

    def __str__(self) -> str:
        return f"routed-{self.pass_}-bf16-D{self.dim}-block{self.block}-{self.feature}"

    def run(self) -> None:
        """Call the launcher on CPU tensors."""
        rows = 1 if self.pass_ == "decode" else Q_LEN
        query = torch.zeros(1, HEADS, rows, self.dim, dtype=HALF)
        key = torch.zeros(1, KV_HEADS, Q_LEN, self.dim, dtype=HALF)
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
        if self.pass_ in ("forward", "decode"):
            routed.forward(call)
        else:
            routed.backward(call, Saved(query, torch.zeros(1, HEADS, rows)), query, None)


def all_launches() -> list[Launch]:
    """Every config for bfloat16 up to D = 128, and features that change a kernel."""
    passes = ("forward", "backward", "atomic", "decode")
    return [
        *(Launch(pass_, dim) for pass_ in passes for dim in (64, 128)),
        Launch("backward", 64, 64, "softcap"),
        Launch("backward", 64, 64, "packed"),
        Launch("forward", 64, 64, "mask"),
        Launch("decode", 64, 64, "lengths"),
        Launch("forward", 128, 16),
    ]
