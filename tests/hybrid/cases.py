"""Option sets of hybrid_attention, and inputs for them."""

from __future__ import annotations

import dataclasses

import torch

from flashmark import HybridState
from tests import helpers

BACKENDS = helpers.BACKENDS
MERGES = ("slots", "mass", "gate")
LENGTHS = (1, 0, 17, 40, 5, 33)  # packed sequences
PACKED = sum(LENGTHS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem whose inputs `arguments` builds, all of them leaves that require a gradient."""

    n: int
    window: int = 8
    marks: int = 5
    merge: str = "slots"
    group: int = 1
    batch: int = 1
    kv_heads: int = 1
    dim: int = 16
    v_dim: int = 16
    landmarks: str = "tied"  # "pair", "batched"
    given_core: bool = False
    padding: tuple[int, int] | None = None  # hidden keys at either end
    packed: bool = False
    gate_shape: str = "full"  # "heads"
    spread: float = 1.0  # standard deviation of the keys
    layout: str = "contiguous"

    def __str__(self) -> str:
        shown = [self.merge, f"N{self.n}", f"w{self.window}", f"M{self.marks}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("n", "window", "marks", "merge") and value != field.default:
                name = field.name if value is True else f"{field.name}={value}"
                shown.append(name.replace(" ", ""))
        return "-".join(shown)

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict:
        heads = self.kv_heads
        query, key, value = helpers.qkv(
            self.batch, heads * self.group, self.n, self.dim, kv_heads=heads, v_dim=self.v_dim,
            dtype=dtype, layout=self.layout,
        )  # fmt: skip
        wide = torch.promote_types(dtype, torch.float32)
        batch = (self.batch,) if self.landmarks == "batched" else ()
        shape = *batch, heads, self.marks, self.dim
        one, two = (helpers.randn(*shape, seed=s, dtype=wide, grad=True) for s in (5, 6))
        arguments = {
            "query": query,
            "key": (key.detach() * self.spread).requires_grad_(),
            "value": value,
            "landmarks": (one, two) if self.landmarks == "pair" else one,
            "window": self.window,
            "merge": self.merge,
        }
        if self.merge == "mass":  # where the kernel is approximated well, its mass is positive
            arguments["query"] = (query.detach() * 0.3).requires_grad_()
        if self.merge == "gate":
            shape = self.batch, heads * self.group, self.n, 1
            shape = (1, shape[1], 1, 1) if self.gate_shape == "heads" else shape
            gate = torch.sigmoid(helpers.randn(*shape, seed=7, dtype=wide))
            arguments["gate"] = helpers.poisoned(gate).requires_grad_()
        if self.given_core:
            core = torch.softmax(helpers.randn(heads, self.marks, self.marks, seed=8), -1)
            arguments["core"] = core.to(wide).requires_grad_()
        if self.padding is not None:
            mask = torch.ones(self.batch, self.n, dtype=torch.bool)
            left, right = self.padding
            mask[0, :left] = False
            mask[-1, self.n - right :] = False
            arguments["key_mask"] = mask
        if self.packed:
            bounds = [sum(LENGTHS[:s]) for s in range(len(LENGTHS) + 1)]
            arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        return arguments

    def empty_state(self, dtype: torch.dtype = torch.float32) -> HybridState:
        rows = len(LENGTHS) if self.packed else self.batch
        return HybridState.empty(
            rows, self.kv_heads, self.marks, self.dim, self.v_dim, window=self.window,
            merge=self.merge, dtype=dtype,
        )  # fmt: skip


def tokens(arguments: dict, part: slice) -> dict:
    """Arguments of a call for some of its tokens."""
    cut = {name: arguments[name][:, :, part] for name in ("query", "key", "value")}
    if "key_mask" in arguments:
        cut["key_mask"] = arguments["key_mask"][:, part]
    if "gate" in arguments and arguments["gate"].shape[2] > 1:
        cut["gate"] = arguments["gate"][:, :, part]
    return arguments | cut


def detached(arguments: dict) -> dict:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)


COVERING = [
    case
    for merge in MERGES
    for case in (
        Case(1, merge=merge),
        Case(2, 1, 3, merge, group=2),
        Case(50, 8, 5, merge, group=4, batch=2, kv_heads=2, v_dim=24, layout="bnhd"),
        Case(64, 8, 1, merge, batch=2, layout="gaps"),
        Case(65, 8, 13, merge, dim=24, v_dim=5),
        Case(127, 1, 8, merge),
        Case(97, 5, 70, merge, group=2, dim=32),
        Case(200, 64, 8, merge, group=2),
        Case(60, 8, 5, merge, batch=2, padding=(7, 0)),
        Case(90, 8, 5, merge, padding=(40, 13), group=2),
        Case(20, 4, 5, merge, padding=(20, 0)),
        Case(70, 8, 5, merge, batch=2, kv_heads=2, landmarks="batched"),
        Case(PACKED, 8, 5, merge, packed=True, group=2),
        Case(PACKED, 8, 5, merge, packed=True, padding=(5, 30)),
        Case(PACKED, 8, 5, merge, packed=True, kv_heads=2, landmarks="batched"),
    )
] + [
    Case(70, 8, 5, "slots", landmarks="pair"),
    Case(70, 8, 5, "gate", landmarks="pair", group=2),
    Case(70, 8, 5, "gate", given_core=True, gate_shape="heads"),
    Case(70, 8, 5, "mass", given_core=True),
]
