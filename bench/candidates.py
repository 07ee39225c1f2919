"""The configs worth trying for each pass of both families of kernels, and how to launch one.

A config is written as text, "block_m=128 block_n=64 num_warps=8 num_stages=3": a column of the CSV
of `bench.sweep`, and read back from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import torch

from flashmark import masks
from flashmark.block_sparse.call import Call, Saved
from flashmark.kernels import block_sparse, nystrom
from flashmark.kernels.block_sparse import configs as sparse_configs
from flashmark.kernels.nystrom import configs as landmark_configs
from flashmark.nystrom.call import Call as NystromCall
from flashmark.nystrom.call import Saved as NystromSaved

Config = sparse_configs.Config | landmark_configs.Config
FAMILIES = {"block_sparse": sparse_configs, "nystrom": landmark_configs}
DTYPE = torch.bfloat16
HEADS = 4  # of an offline launch; a grouped pass has half as many key heads

# Tiles of queries x keys / warps, then the stages; r128 caps the registers of a thread. A key pass
# holds the keys, the others queries.
_TILES = {
    "forward": {
        "plain": "128x64/8 2 3 4, 128x128/8 2 3, 64x64/4 2 3 4, 64x128/4 2 3, 128x64/4 2 3, "
        "128x32/8 3, 256x64/8 2, 64x128/8 2, 64x64/4r168 3, 128x64/4r168 2",
        "extras": "128x64/8 2 3, 64x64/4 2 3, 128x32/8 2, 64x64/8 2, 128x128/8 2",
    },
    "backward_q": {
        "plain": "128x64/8 2 3, 128x128/8 2, 64x64/4 2 3, 64x128/8 2, 64x128/4 2, 128x32/8 2 3, "
        "64x32/4 3, 128x64/8r128 2 3, 128x32/8r128 3, 64x128/4r168 2, 64x64/4r168 3",
        "extras": "128x64/8 2, 64x64/4 2, 64x64/8 2 3, 128x32/8 2",
    },
    "backward_kv": {
        "plain": "64x128/8 2 3, 64x64/4 2 3, 64x64/8 2 3, 32x128/8 2 3, 128x64/8 2, 32x64/4 3, "
        "64x64/4r168 2, 32x64/4r168 3, 32x128/8r128 2",
        "extras": "32x128/8 2, 64x64/8 2, 64x64/4 2, 32x64/8 2, 64x128/8 2",
    },
    "backward_grouped": {
        "plain": "64x128/8 2, 64x64/4 2, 64x64/8 2 3, 32x128/8 2 3, 32x64/4 3, 32x64/4r168 3, "
        "32x128/8r128 2",
        "extras": "32x64/8 2, 32x128/8 2, 64x64/8 2, 16x64/8 2",
    },
    "backward_fused": {
        "plain": "64x128/8 2 3, 64x64/4 2 3, 64x64/8 2 3, 32x128/8 2 3, 128x64/8 2, 32x64/4 3, "
        "64x64/4r168 2, 32x64/4r168 3, 32x128/8r128 2",
        "extras": "32x128/8 2, 64x64/8 2, 64x64/4 2, 32x64/8 2",
    },
    "decode": {"plain": "16x64/4 3 4 5, 16x128/4 2 3, 16x128/8 3, 16x32/4 4, 16x64/2 4"},
}
# Other forms of the forward, of plain work only; four warps let the descriptor form specialise.
_FORMS = {
    "descriptors": "128x64/4 2 3, 128x128/4 2, 128x64/8 2 3, 128x128/8 2",
    "gluon": "128x64/4 2 3 4, 128x128/4 2, 64x64/4 2 3, 64x128/4 2",
}

# What a Nyström pass may change from the config that ships, one thing or two at a time.
_CHANGES = {
    "states": ("chunk/2", "chunk*2", "num_warps", "num_stages=2"),
    "forward": (
        "chunk/2", "chunk*2", "num_warps", "num_stages=2", "block_v/2", "num_warps chunk*2",
        "registers=168", "chunk/2 registers=168", "registers=128",
    ),
    "rows": (
        "chunk*2", "num_warps", "num_stages=2", "shares=1", "shares=2", "shares=3", "block_v/2",
        "block_v/2 block_d/2", "block_v*2", "block_v*2 block_d*2", "registers=168",
    ),
    "keys": (
        "chunk*2", "num_warps", "num_stages=2", "shares=1", "shares=2", "block_v/2",
        "block_v/2 block_d/2", "block_v*2", "block_v*2 block_d*2", "registers=168",
    ),
    "read": ("chunk/2", "chunk*2", "num_warps", "num_stages=2"),
    "decode": ("num_warps", "block_v/2", "block_v*2", "num_stages=2"),
}  # fmt: skip
_WIDTHS = ((64, 64), (32, 32), (64, 128), (128, 64), (128, 128))  # landmarks, head dimension
_MORE_WIDTHS = ((32, 64), (64, 32), (32, 128), (128, 32))  # for the forward

_KERNELS = {
    "backward_q": "backward_q_kernel",
    **dict.fromkeys(sparse_configs.KEY_PASSES, "backward_kv_kernel"),
    "states": "states_kernel",
    "rows": "rows_kernel",
    "keys": "keys_kernel",
    "read": "read_kernel",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A pass of a family over operands of one kind, in bfloat16."""

    family: str
    pass_: str
    dim: int
    marks: int = 0  # landmarks, of Nyström
    block: int = 0  # of the mask; 0 where it is causal and compared, or of Nyström
    extras: bool = False  # a relative bias

    def __str__(self) -> str:
        kind = f"M={self.marks}" if self.marks else f"blocks of {self.block}" * bool(self.block)
        kind = kind or "causal"
        return f"{self.pass_}, {kind}{', bias' * self.extras}, D={self.dim}"

    @property
    def backward(self) -> bool:
        return self.pass_.startswith("backward") or self.pass_ in ("rows", "keys")

    @property
    def grouped(self) -> bool:
        return self.pass_ in ("backward_grouped", "decode") and self.family == "block_sparse"

    def shipped(self, arch: int | str = 90) -> Config:
        """What runs where nobody forces anything."""
        if self.family == "nystrom":
            tokens = 1 if self.pass_ == "decode" else 65536
            widths = self.marks, self.dim, self.dim
            return landmark_configs.choose(arch, self.pass_, DTYPE, *widths, tokens)
        block = (self.block, self.block) if self.block else None
        return sparse_configs.choose(arch, DTYPE, self.dim, block, self.pass_, self.extras)

    def candidates(self, arch: int | str = 90) -> list[Config]:
        """The shipped config, then the others, each once."""
        shipped = self.shipped(arch)
        if self.family == "nystrom":
            others = [_changed(shipped, change) for change in _CHANGES[self.pass_]]
            others = [x for x in others if _makes_sense(x, self)]
        else:
            others = self._tiles()
        return list(dict.fromkeys([shipped, *others]))

    def _tiles(self) -> list[Config]:
        kind = "extras" if self.extras else "plain"
        configs = _parse_tiles(_TILES[self.pass_][kind], first_only=self.block > 0)
        if self.pass_ == "forward" and not self.extras:
            for form, text in _FORMS.items():
                more = _parse_tiles(text, first_only=self.block > 0)
                configs += [dataclasses.replace(x, form=form) for x in more]
        most = self.block or 256
        return [x for x in configs if max(x.block_m, x.block_n) <= most]

    def using(self, config: Config) -> contextlib.AbstractContextManager:
        """Force the config on this pass. Both sides of a Nyström backward walk the same chunks."""
        passes = {self.pass_: config}
        if self.pass_ in ("rows", "keys"):
            other = "keys" if self.pass_ == "rows" else "rows"
            same = {name: getattr(config, name) for name in ("chunk", "block_v", "block_d")}
            passes[other] = dataclasses.replace(
                dataclasses.replace(self, pass_=other).shipped(), **same
            )
        return FAMILIES[self.family].using(**passes)

    def wanted(self, kernel: str, arguments: tuple) -> bool:
        """Is this launch of the pass, and not of another, or of pieces that seldom run?"""
        pieces = any(getattr(x, "PIECES", False) for x in arguments)
        if self.pass_ in _KERNELS:
            return kernel == _KERNELS[self.pass_] and not pieces
        if self.family == "nystrom":
            return kernel == "output_kernel" and pieces == (self.pass_ == "decode")
        return self.pass_ in kernel

    def launch(self, tokens: int = 1024) -> None:
        """Call the launchers on zeros on the CPU, to be compiled or to be seen."""
        run = _launch_nystrom if self.family == "nystrom" else _launch_block_sparse
        run(self, tokens)


def all_cases() -> list[Case]:
    """Every case that is swept, the ones that matter most first."""
    sparse = [
        Case("block_sparse", pass_, dim, block=block, extras=extras)
        for block, extras in ((0, False), (128, False), (64, False), (0, True))
        for pass_, dim in itertools.product(sparse_configs.PASSES, (128, 64))
        if "extras" in _TILES[pass_] or not (block or extras)
        if pass_ != "backward_grouped" or block != 64
    ]
    widths = [(pass_, _WIDTHS) for pass_ in ("forward", "states", "rows", "keys")]
    widths += [(pass_, _WIDTHS[:1] + _WIDTHS[-1:]) for pass_ in ("read", "decode")]
    marks = [
        Case("nystrom", pass_, dim, marks)
        for pass_, some in [*widths, ("forward", _MORE_WIDTHS)]
        for marks, dim in some
    ]
    return sparse + marks


def written(config: Config) -> str:
    """The config as text; a field that has its default is left out."""
    fields = dataclasses.fields(config)
    shown = [f.name for f in fields if getattr(config, f.name) != f.default]
    return " ".join(f"{name}={getattr(config, name)}" for name in shown)


def read(family: str, text: str) -> Config:
    """What `written` wrote."""
    pairs = (pair.split("=") for pair in text.split())
    return FAMILIES[family].Config(**{k: int(v) if v.isdigit() else v for k, v in pairs})


def _parse_tiles(text: str, first_only: bool) -> list[sparse_configs.Config]:
    """Stages make other code, but no other registers: under a mask one number of them will do."""
    configs = []
    for entry in filter(None, text.split(", ")):
        tile, *stages = entry.split()
        stages = stages[: 1 if first_only else None]
        tile, _, cap = tile.partition("r")
        block_m, block_n, warps = map(int, tile.replace("/", "x").split("x"))
        registers = int(cap) if cap else None
        configs += [
            sparse_configs.Config(block_m, block_n, warps, int(n), registers=registers)
            for n in stages
        ]
    return configs


def _changed(config: landmark_configs.Config, text: str) -> landmark_configs.Config:
    """ "chunk*2", "chunk/2", "num_stages=2", or "num_warps" (the other of 4 and 8), and pairs."""
    for change in text.split():
        name = change.rstrip("0123456789").rstrip("*/=")
        now, sign, count = getattr(config, name), change[len(name) :][:1], change[len(name) + 1 :]
        match sign:
            case "*":
                now *= int(count)
            case "/":
                now //= int(count)
            case "=":
                now = int(count)
            case _:
                now = 12 - now
        config = dataclasses.replace(config, **{name: now})
    return config


def _makes_sense(config: landmark_configs.Config, case: Case) -> bool:
    """A wide backward that holds more in a thread than what ships, which spills, is left out."""
    shipped = case.shipped()
    if case.backward and max(case.marks, case.dim) > 64:
        if config.num_warps < shipped.num_warps or config.shares < shipped.shares:
            return False
        if config.chunk > shipped.chunk:
            return False
    if config.registers == {4: 128, 8: 168}[config.num_warps]:  # no program more beside it
        return False
    return 16 <= config.chunk <= 128 and 16 <= config.block_v <= case.dim


def _launch_block_sparse(case: Case, tokens: int) -> None:
    q_len = 1 if case.pass_ == "decode" else tokens
    query = torch.zeros(1, HEADS, q_len, case.dim, dtype=DTYPE)
    key = torch.zeros(1, HEADS // 2 if case.grouped else HEADS, tokens, case.dim, dtype=DTYPE)
    expression = masks.sliding_window(300) if case.block else masks.causal()
    size = case.block or 128
    mask = masks.compile_mask(expression, 1, 1, tokens, tokens, device="cpu", block_size=size)
    bias = torch.zeros(HEADS, 2 * tokens - 1) if case.extras else None
    offset = torch.zeros(1, dtype=torch.int32) if case.pass_ == "decode" else None
    call = Call(
        query, key, key, mask, case.dim**-0.5, bias, query_offset=offset,
        deterministic=case.pass_ != "backward_fused",
    )  # fmt: skip
    if case.backward:
        lse = torch.zeros(1, HEADS, tokens)
        saved = Saved(query, lse, torch.zeros_like(lse))
        block_sparse.backward(call, saved, query, None)
    else:
        block_sparse.forward(call)


def _launch_nystrom(case: Case, tokens: int) -> None:
    tokens = 1 if case.pass_ == "decode" else 4 * tokens
    query = torch.zeros(1, HEADS, tokens, case.dim, dtype=DTYPE)
    landmarks = torch.zeros(HEADS, case.marks, case.dim)
    core = torch.zeros(HEADS, case.marks, case.marks)
    L0 = torch.zeros(1, HEADS, case.marks) if case.pass_ == "decode" else None
    R0 = None if L0 is None else torch.zeros(*L0.shape, case.dim)
    call = NystromCall(
        query, query, query, landmarks, landmarks, core, case.dim**-0.5, L0=L0, R0=R0,
        is_causal=case.pass_ != "read",
    )  # fmt: skip
    if case.backward:
        nystrom.backward(call, NystromSaved(query, None, None), query, None, None)
    else:
        nystrom.forward(call)
