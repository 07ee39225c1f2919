"""Calls of Nyström attention that between them make `configs.choose` give every config it can."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from flashmark.kernels import nystrom
from flashmark.nystrom.call import Call, Saved

HALF, SINGLE = torch.bfloat16, torch.float32
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call. `pass_`: "forward", "backward", "decode" or "bidirectional" (both directions)."""

    pass_: str
    marks: int
    dim: int
    feature: str = "plain"  # or "mass", "decay", "grouped", "packed"
    dtype: torch.dtype = HALF
    v_dim: int = 0  # as `dim` where 0

    def __str__(self) -> str:
        dtype = {HALF: "bf16", SINGLE: "fp32"}.get(self.dtype, "fp16")
        widths = f"M{self.marks}-D{self.dim}" + (f"-Dv{self.v_dim}" if self.v_dim else "")
        return f"{self.pass_}-{dtype}-{widths}-{self.feature}"

    def run(self) -> None:
        """Call the launchers on CPU tensors."""
        tokens = 1 if self.pass_ == "decode" else 4096
        group = 2 if self.feature == "grouped" else 1
        query = torch.zeros(1, HEADS * group, tokens, self.dim, dtype=self.dtype)
        key = torch.zeros(1, HEADS, tokens, self.dim, dtype=self.dtype)
        value = torch.zeros(1, HEADS, tokens, self.v_dim or self.dim, dtype=self.dtype)
        landmarks = torch.zeros(HEADS, self.marks, self.dim)
        core = torch.zeros(HEADS, self.marks, self.marks)
        decay = torch.zeros(HEADS, self.marks) if self.feature == "decay" else None
        bounds = torch.tensor([0, 100, tokens], dtype=torch.int32)
        L0 = torch.zeros(1, HEADS, self.marks) if self.pass_ == "decode" else None
        R0 = None if L0 is None else torch.zeros(*L0.shape, value.shape[3])
        call = Call(
            query, key, value, landmarks, landmarks, core, 0.125, decay,
            cu_seqlens=bounds if self.feature == "packed" else None, L0=L0, R0=R0,
            mass=self.feature == "mass", is_causal=self.pass_ != "bidirectional",
        )  # fmt: skip
        if self.pass_ in ("forward", "decode", "bidirectional"):
            nystrom.forward(call)
        if self.pass_ in ("backward", "bidirectional"):
            out = torch.zeros(*query.shape[:3], value.shape[3], dtype=self.dtype)
            nystrom.backward(call, Saved(None, None, None), out, None, None)


WIDTHS = (32, 64, 128)
FEATURES = ("mass", "decay", "grouped", "packed")


def all_launches() -> list[Launch]:
    """Every width in bfloat16, and a few of everything else."""
    product, both = itertools.product, ("forward", "backward")
    return [
        *(Launch(p, m, d) for p, m, d in product(both, WIDTHS, WIDTHS)),
        *(Launch(p, 64, 64, f) for p, f in product(both, FEATURES)),
        *(Launch(p, m, m) for p, m in product(("decode", "bidirectional"), WIDTHS)),
        *(Launch(p, m, m, dtype=torch.float16) for p, m in product(both, (64, 128))),
        *(Launch(p, m, m, dtype=SINGLE) for p, m in product(both, (32, 64))),
        *(Launch(p, 64, 64, dtype=SINGLE) for p in ("decode", "bidirectional")),
        *(Launch("bidirectional", m, m, dtype=torch.float16) for m in (64, 128)),
        *(Launch(p, 64, d, v_dim=v) for p in both for d, v in ((64, 128), (128, 64))),
        *(Launch(p, 64, 256) for p in both),
    ]
