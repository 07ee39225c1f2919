"""The Hopper form of the block-sparse forward kernel compiles, fits, does not spill, loads through
TMA and specialises warps.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

from bench.offline import SHARED_MEMORY, compiling_for, inspect
from flashmark import masks
from flashmark.block_sparse.call import Call
from flashmark.kernels.block_sparse import configs, forward
from tests.compile import budgets, machine_code
from tests.compile.test_block_sparse_kernels import ALL

FORMS = ("gluon",)
KINDS = {"sparse": masks.sliding_window(300), "causal": masks.causal(), "dense": None}
LENGTH, HEADS, KV_HEADS = 1024, 4, 2
ONE = torch.zeros(1, dtype=torch.int32)
FEATURES = {
    "sinks": {"sinks": torch.zeros(HEADS)},
    "softcap": {"softcap": 30.0},
    "relative": {"bias": torch.zeros(HEADS, 2 * LENGTH - 1)},
    "dense": {"bias": torch.zeros(1, HEADS, LENGTH, LENGTH)},
    "offset": {"query_offset": ONE},
    "lengths": {"kv_lengths": ONE},
    "dropout": {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)},
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A forward of grouped heads with the config that ships for it."""

    form: str
    dim: int
    kind: str
    block: int = 128
    v_dim: int = 0  # 0: dim
    dtype: torch.dtype = torch.bfloat16
    feature: str = ""  # one of FEATURES

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"D{self.dim}" + (f"-DV{self.v_dim}" if self.v_dim else "")
        extras = f"-{self.feature}" if self.feature else ""
        return f"{self.form}-{shape}-{self.kind}{self.block}-{dtype}{extras}"

    @property
    def config(self) -> configs.Config:
        block = (self.block, self.block) if self.kind == "sparse" else None
        extras = self.feature in ("relative", "dense", "dropout")
        return configs.hopper(self.form, max(self.dim, self.v_dim), block, extras)

    def run(self) -> None:
        query = torch.zeros(1, HEADS, LENGTH, self.dim, dtype=self.dtype)
        key = torch.zeros(1, KV_HEADS, LENGTH, self.dim, dtype=self.dtype)
        value = torch.zeros(1, KV_HEADS, LENGTH, self.v_dim or self.dim, dtype=self.dtype)
        shape = (1, 1, LENGTH, LENGTH)
        mask = masks.compile_mask(KINDS[self.kind], *shape, device="cpu", block_size=self.block)
        with configs.using(forward=self.config):
            forward(Call(query, key, value, mask, 0.125, **FEATURES.get(self.feature, {})))


LAUNCHES = [
    *(Launch(f, d, "sparse") for f, d in itertools.product(FORMS, (64, 128))),
    *(
        Launch(f, d, k)
        for f, (d, k) in itertools.product(FORMS, ((64, "causal"), (128, "causal"), (128, "dense")))
    ),
    *(Launch(f, 128, "sparse", 64) for f in FORMS),
    *(Launch(f, 72, "sparse", 128, 40, torch.float16, "sinks") for f in FORMS),
    *(
        Launch("gluon", d, k, feature=x)
        for (d, k), x in itertools.product(((64, "causal"), (128, "sparse")), FEATURES)
    ),
]


def is_rare(launch) -> bool:
    """Whether a launch is compiled only where targets are named: a sibling stands for it."""
    if launch.dim == 72:
        return False
    if launch.kind == "dense" or launch.block == 64 or launch.dim == 64:
        return (launch.kind, launch.block, launch.feature) != ("sparse", 128, "")
    return launch.feature not in ("", "relative", "lengths")


@pytest.mark.parametrize("launch", [x for x in LAUNCHES if ALL or not is_rare(x)], ids=str)
def test_form(launch):
    with compiling_for(90) as launches:
        launch.run()
    ((name, kernel),) = launches
    assert name == f"forward_{launch.form}_kernel"
    assert budgets.complaints(str(launch), name, kernel) == []
    report = inspect(name, kernel)
    assert report.spilled == 0, report
    assert report.shared <= SHARED_MEMORY[90], report
    assert report.hgmma > 0 and report.hmma == 0, report
    code = machine_code.disassemble(kernel.asm["cubin"])
    assert all(code.count(name) > 0 for name in ("UTMALDG", "UTMASTG", "USETMAXREG"))
    assert report.threads > 32 * launch.config.num_warps


SHAPES = list(itertools.product((64, 128), (None, 64, 128)))


@pytest.mark.parametrize(("dim", "block"), SHAPES, ids=str)
def test_the_default_on_hopper(dim, block, asked):
    """Half precision and heads up to 128 take the form; float32 and wider heads do not."""
    shape = (1, 1, LENGTH, LENGTH)
    expression = masks.causal() if block is None else masks.sliding_window(300)
    mask = masks.compile_mask(expression, *shape, device="cpu", block_size=block or 128)
    kernels = {}
    for arch, dtype, width in (
        (90, torch.bfloat16, dim),
        (90, torch.float16, dim),
        (90, torch.float32, dim),
        (90, torch.bfloat16, 256),
        (80, torch.bfloat16, dim),
        (100, torch.bfloat16, dim),
    ):
        asked.clear()
        query = torch.zeros(1, HEADS, LENGTH, width, dtype=dtype)
        with compiling_for(arch):
            forward(Call(query, query, query, mask, 0.125))
        kernels[arch, dtype, width] = asked[0][0]
    takers = [key for key, kernel in kernels.items() if kernel == "forward_gluon_kernel"]
    assert takers == [(90, torch.bfloat16, dim), (90, torch.float16, dim)]
    assert set(kernels.values()) == {"forward_gluon_kernel", "forward_kernel"}


def test_gluon_is_imported_by_those_who_ask_for_it():
    code = (
        "import sys; sys.modules['triton.experimental.gluon'] = None\n"
        "import flashmark.kernels.block_sparse"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
