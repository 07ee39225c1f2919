"""Tile sizes, warps and stages of each kernel: one frozen record and one plain function.

Sizes come from offline compilation for compute capability 9.0: the largest tiles that neither spill
registers nor outgrow shared memory. tests/compile holds every choice to that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

# dK and dV alone, for one query head or for a group of them, and together with dQ
KEY_PASSES = ("backward_kv", "backward_grouped", "backward_fused")
PASSES = ("forward", "jvp", "backward_q", *KEY_PASSES, "decode")

# how a forward kernel reads its operands; the second needs Hopper
FORMS = ("pointers", "gluon")

# log2 of the largest growth of a maximum, and so of probabilities, before a lazy form rescales
SLACK = 8


class Runnable:
    """Fields that the configs of all kernels share."""

    num_warps: int
    num_stages: int
    registers: int | None = None  # of a thread, at most; None leaves them to the compiler

    @property
    def options(self) -> dict[str, int]:
        """Options for Triton. Only NVIDIA GPUs have a register cap: it is passed where set."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


@dataclasses.dataclass(frozen=True)
class Config(Runnable):
    """Tile of queries, tile of keys, how a program is run, and which form of the kernel it is."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    form: str = "pointers"  # one of FORMS
    registers: int | None = None
    lazy: bool = False  # "gluon" alone: the output is rescaled only when a maximum outgrows SLACK

    def __post_init__(self) -> None:
        if self.lazy and self.form != "gluon":
            raise ValueError(f"lazy: expected the form 'gluon', got {self.form!r}")


# By (width of the head, whether extras are on).
_HALF = {
    "forward": {
        (64, False): Config(128, 64, 8, 3, registers=128),  # two programs to a multiprocessor
        (64, True): Config(128, 64, 8, 2),
        (128, False): Config(128, 64, 8, 3),
        (128, True): Config(128, 64, 8, 2),
        (256, False): Config(64, 64, 8, 2),
        (256, True): Config(64, 32, 8, 2),
    },
    "jvp": {
        (64, False): Config(64, 64, 4, 2),
        (64, True): Config(64, 32, 4, 2),
        (128, False): Config(128, 32, 8, 2),
        (128, True): Config(64, 16, 8, 2),
        (256, False): Config(64, 32, 8, 1),
        (256, True): Config(64, 32, 8, 1),
    },
    "backward_q": {
        (64, False): Config(128, 64, 8, 3, registers=128),  # as the forward
        (64, True): Config(128, 64, 8, 2),
        (128, False): Config(128, 64, 8, 2),
        (128, True): Config(64, 64, 8, 2),
        (256, False): Config(64, 32, 8, 2),
        (256, True): Config(64, 32, 8, 2),
    },
    "backward_kv": {
        (64, False): Config(64, 128, 8, 2),
        (64, True): Config(32, 128, 8, 2),
        (128, False): Config(64, 128, 8, 2),
        (128, True): Config(32, 64, 8, 2),
        (256, False): Config(32, 64, 8, 2),
        (256, True): Config(16, 64, 8, 2),
    },
    "backward_grouped": {
        (64, False): Config(64, 128, 8, 2),
        (64, True): Config(32, 64, 8, 2),
        (128, False): Config(32, 128, 8, 2),
        (128, True): Config(16, 64, 8, 2),
        (256, False): Config(32, 64, 8, 2),
        (256, True): Config(16, 64, 8, 2),
    },
    "backward_fused": {
        (64, False): Config(64, 128, 8, 2),
        (64, True): Config(32, 128, 8, 2),
        (128, False): Config(32, 128, 8, 2),
        (128, True): Config(32, 64, 8, 2),
        (256, False): Config(32, 64, 8, 2),
        (256, True): Config(16, 64, 8, 2),
    },
    "decode": {
        (64, False): Config(16, 64, 4, 3),
        (64, True): Config(16, 64, 4, 3),
        (128, False): Config(16, 64, 4, 3),
        (128, True): Config(16, 64, 4, 2),
        (256, False): Config(16, 32, 4, 2),
        (256, True): Config(16, 32, 4, 2),
    },
}

# float32 products outside the tensor cores, by width of the head
_EXACT = {
    "forward": {64: Config(64, 32, 8, 2), 128: Config(32, 16, 8, 2), 256: Config(16, 16, 8, 1)},
    "jvp": {64: Config(32, 32, 8, 2), 128: Config(16, 16, 8, 2), 256: Config(16, 16, 8, 1)},
    "backward_q": {64: Config(32, 32, 8, 2), 128: Config(32, 16, 8, 2), 256: Config(16, 16, 8, 1)},
    "keys": {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    "decode": {64: Config(16, 32, 4, 2), 128: Config(16, 16, 4, 2), 256: Config(16, 16, 4, 1)},
}
_TF32 = {
    "forward": {64: Config(128, 32, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
    "jvp": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 1)},
    "backward_q": {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    "keys": {64: Config(16, 64, 8, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    "decode": {64: Config(16, 64, 4, 2), 128: Config(16, 64, 4, 2), 256: Config(16, 32, 4, 1)},
}

# Hopper's form of the forward kernel, by (form, width of the head, whether a bias or dropout takes
# registers); on Hopper it is chosen for what it can compute (forms.py).
HOPPER = {
    ("gluon", 64, False): Config(128, 128, 4, 3, "gluon"),
    ("gluon", 128, False): Config(128, 128, 4, 2, "gluon", lazy=True),
    # a bias takes the registers of 64 keys
    ("gluon", 64, True): Config(128, 64, 4, 3, "gluon"),
    ("gluon", 128, True): Config(128, 64, 4, 3, "gluon", lazy=True),
}

# Gluon kernels of the backward pass: tiles that walk have 64 rows, and a warpgroup holds 64
HOPPER_BACKWARD = {
    "backward_kv": Config(64, 128, 4, 4, "gluon"),
    "backward_q": Config(128, 64, 4, 4, "gluon"),
}

_IN_USE: dict[str, Config] = {}
_HOPPER_FORMS = {"allowed": True}


@contextlib.contextmanager
def with_entries(table: dict, entries: dict) -> Iterator[None]:
    """Replace entries of a table inside a `with` block."""
    before = dict(table)
    table.update(entries)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def using(**passes: Config) -> contextlib.AbstractContextManager[None]:
    """Run passes, by name, with these configs whatever the operands: for tests and measurements."""
    return with_entries(_IN_USE, passes)


def in_use(pass_: str) -> bool:
    """Whether a pass runs with a config whatever the operands."""
    return pass_ in _IN_USE


def hopper_forms() -> bool:
    """Whether calls may take the Hopper form of a kernel."""
    return _HOPPER_FORMS["allowed"]


def pointer_forms() -> contextlib.AbstractContextManager[None]:
    """Take the pointer form of every kernel inside a `with` block, on Hopper too."""
    return with_entries(_HOPPER_FORMS, {"allowed": False})


def choose(
    arch: int | str,
    dtype: torch.dtype,
    head_dim: int,
    block: tuple[int, int] | None,
    pass_: str,
    extras: bool = False,
    exact: bool = True,
) -> Config:
    """The config for one of `PASSES`.

    `arch` as from `device_arch`; `head_dim` is the padded width of the wider of keys and values;
    `block` is the mask's (None when comparison decides), which tiles divide; `extras` says that a
    bias, dropout or a softcap take registers, `exact` that float32 products stay float32 instead of
    going through the tensor cores as tf32.
    """
    if pass_ in _IN_USE:
        config = _IN_USE[pass_]
        if block is not None and (block[0] % config.block_m or block[1] % config.block_n):
            raise ValueError(
                f"{pass_}: expected tiles that divide a block of {block}, got {config}"
            )
        return config
    return _chosen(arch, dtype, head_dim, block, pass_, extras, exact)


@functools.lru_cache(1024)
def _chosen(
    arch: int | str,
    dtype: torch.dtype,
    head_dim: int,
    block: tuple[int, int] | None,
    pass_: str,
    extras: bool,
    exact: bool,
) -> Config:
    """`choose`, when no config is in use for a pass."""
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if arch == "cpu":
        config = Config(
            *{"backward_q": (64, 32), "backward_kv": (32, 64)}.get(pass_, (32, 32)), 4, 1
        )
    elif dtype == torch.float32:
        side = "keys" if pass_ in KEY_PASSES else pass_
        config = (_EXACT if exact else _TF32)[side][width]
    else:
        config = _HALF[pass_][width, extras]
    if block is not None:
        config = _divide(config, block, pass_, width, extras)
    return fit(config, arch, width, dtype)


@functools.lru_cache(1024)
def hopper(
    form: str, head_dim: int, block: tuple[int, int] | None = None, extras: bool = False
) -> Config:
    """The config of a Hopper form, "gluon", for `head_dim`, the wider of keys and values, and a
    mask's block as in `choose`.
    """
    config = HOPPER[form, 64 if head_dim <= 64 else 128, extras]
    if block is None:
        return config
    block_m, block_n = min(config.block_m, block[0]), min(config.block_n, block[1])
    return dataclasses.replace(config, block_m=block_m, block_n=block_n)


def hopper_backward(pass_: str, block: tuple[int, int] | None = None) -> Config:
    """The Gluon config of "backward_kv", for one query head or a group, or of "backward_q", and a
    mask's block as in `choose`.
    """
    config = _IN_USE.get(pass_, HOPPER_BACKWARD[pass_])
    if block is None:
        return config
    block_m, block_n = min(config.block_m, block[0]), min(config.block_n, block[1])
    return dataclasses.replace(config, block_m=block_m, block_n=block_n)


def pointers_in_use(*passes: str) -> bool:
    """Whether one of these passes is to run with a config of the pointer form."""
    return any(pass_ in _IN_USE and _IN_USE[pass_].form == "pointers" for pass_ in passes)


def _divide(config: Config, block: tuple[int, int], pass_: str, width: int, extras: bool) -> Config:
    """Limit tiles to the mask's block, and warps to those that a small tile can use."""
    block_m, block_n = min(config.block_m, block[0]), min(config.block_n, block[1])
    divided = dataclasses.replace(config, block_m=block_m, block_n=block_n)
    light = width == 64 and not extras
    if divided != config and (light or (block_m <= 32 and pass_ not in KEY_PASSES)):
        return dataclasses.replace(divided, num_warps=4, registers=None)
    return divided


def fit(config: Config, arch: int | str, width: int, dtype: torch.dtype) -> Config:
    """Fit a config to another GPU: no register cap except on Hopper, where it was chosen; fewer
    stages, then smaller tiles, where shared memory is less than 227 KiB.
    """
    if arch in (90, "cpu"):
        return config
    config = dataclasses.replace(config, registers=None)
    if arch in (100, 103):
        return config
    if arch == 80:
        return dataclasses.replace(config, num_stages=min(config.num_stages, 2))
    single = dtype == torch.float32
    small = 16 if single and width > 128 else 32 if single or width > 64 else 64
    return Config(min(config.block_m, small), min(config.block_n, small), 4, 1)


@functools.cache
def device_arch(device: torch.device) -> int | str:
    """90 for compute capability 9.0, "gfx942" for an AMD GPU, "cpu" for Triton's interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; a small number under the interpreter."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
