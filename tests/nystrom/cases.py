"""Option sets of nystrom_attention, and inputs for them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashmark.dispatch import CAN_RUN
from tests import helpers

BACKENDS = [b for b in helpers.BACKENDS if CAN_RUN[b]("nystrom", torch.zeros(1))]
LENGTHS = (1, 2, 63, 64, 65, 300)  # packed sequences


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem whose inputs `arguments` builds, all of them leaves that require a gradient."""

    n: int
    marks: int
    group: int = 1
    batch: int = 1
    kv_heads: int = 1
    dim: int = 16
    v_dim: int = 16
    landmarks: str = "tied"  # "pair", "batched"
    given_core: bool = False
    decay: float = 0.0
    normalize: str = "landmark"
    padding: tuple[int, int] | None = None  # hidden keys at either end
    packed: bool = False
    state: bool = False
    is_causal: bool = True
    kv_len: int | None = None
    spread: float = 1.0  # standard deviation of the keys
    layout: str = "contiguous"

    def __str__(self) -> str:
        names = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        shown = [f"N{self.n}", f"M{self.marks}", f"G{self.group}"]
        for name, (value, default) in names.items():
            if name not in ("n", "marks", "group", "dim") and value != default:
                shown.append(name if value is True else f"{name}={value}".replace(" ", ""))
        return "-".join(shown)

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict:
        heads, kv_len = self.kv_heads, self.kv_len or self.n
        query, key, value = helpers.qkv(
            self.batch, heads * self.group, self.n, self.dim, kv_heads=heads, kv_len=kv_len,
            v_dim=self.v_dim, dtype=dtype, layout=self.layout,
        )  # fmt: skip
        wide = torch.promote_types(dtype, torch.float32)
        arguments = {
            "query": query,
            "key": (key.detach() * self.spread).requires_grad_(),
            "value": value,
            "landmarks": self._landmarks(wide),
            "normalize": self.normalize,
            "is_causal": self.is_causal,
        }
        if self.normalize == "mass":  # where the kernel is approximated well, its mass is positive
            arguments["query"] = (query.detach() * 0.3).requires_grad_()
        if self.given_core:
            core = torch.softmax(helpers.randn(heads, self.marks, self.marks, seed=8), -1)
            arguments["core"] = core.to(wide).requires_grad_()
        if self.decay:
            decay = helpers.randn(heads, self.marks, seed=9, dtype=wide).abs() * self.decay
            arguments["decay"] = decay.requires_grad_()
        if self.padding is not None:
            mask = torch.ones(self.batch, kv_len, dtype=torch.bool)
            left, right = self.padding
            mask[0, :left] = False
            mask[-1, kv_len - right :] = False
            arguments["key_mask"] = mask
        rows = self.batch
        if self.packed:
            bounds = [sum(LENGTHS[:s]) for s in range(len(LENGTHS) + 1)]
            arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
            rows = len(LENGTHS)
        if self.state:
            L = helpers.randn(rows, heads, self.marks, seed=10, dtype=wide)
            R = helpers.randn(rows, heads, self.marks, self.v_dim, seed=11, dtype=wide)
            arguments["state"] = (L.requires_grad_(), R.requires_grad_())
        return arguments

    def _landmarks(self, dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
        batch = (self.batch,) if self.landmarks == "batched" else ()
        shape = *batch, self.kv_heads, self.marks, self.dim
        one, two = (helpers.randn(*shape, seed=s, dtype=dtype, grad=True) for s in (5, 6))
        return (one, two) if self.landmarks == "pair" else one


PACKED = sum(LENGTHS)
COVERING = [
    Case(1, 8),
    Case(1, 13, group=4, state=True, decay=0.1),
    Case(2, 1, group=4),
    Case(2, 64, decay=1.0, batch=2),
    Case(63, 13, group=4, decay=0.05, layout="bnhd", batch=2, kv_heads=2),
    Case(64, 64, v_dim=24),
    Case(65, 200, decay=0.3, dim=32),
    Case(65, 8, group=4, landmarks="pair", given_core=True),
    Case(127, 13, landmarks="batched", batch=2, kv_heads=2, v_dim=5),
    Case(127, 200, group=4, dim=32, v_dim=8),
    Case(300, 1, decay=0.02),
    Case(300, 64, given_core=True, state=True),
    Case(300, 13, group=4, decay=3.0),
    Case(1000, 8, decay=0.01),
    Case(1000, 13),
    Case(100, 13, padding=(7, 0), batch=2),
    Case(200, 13, group=4, padding=(70, 66), decay=0.1, state=True),
    Case(70, 8, padding=(70, 0)),
    Case(PACKED, 13, packed=True, decay=0.1, group=4),
    Case(PACKED, 8, packed=True, state=True, padding=(5, 30)),
    Case(1, 8, normalize="mass"),
    Case(65, 13, normalize="mass", group=4, decay=0.1, padding=(3, 0)),
    Case(300, 8, normalize="mass", state=True, batch=2, v_dim=24),
    Case(PACKED, 8, normalize="mass", packed=True, decay=0.05, state=True),
    Case(50, 13, is_causal=False, kv_len=70, group=4, padding=(5, 9), batch=2),
    Case(70, 64, is_causal=False, kv_len=50, state=True),
    Case(1, 8, is_causal=False, kv_len=30, normalize="mass", group=4, state=True),
    Case(PACKED, 13, is_causal=False, packed=True, state=True, normalize="mass"),
]
