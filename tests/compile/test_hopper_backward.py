"""The Gluon form of the block-sparse backward kernels compiles, fits, does not spill, loads through
TMA and specialises warps.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bench.offline import SHARED_MEMORY, compiling_for, inspect
from flashmark import masks
from flashmark.block_sparse.call import Call, Saved
from flashmark.kernels.block_sparse import backward, configs
from tests.compile import budgets, machine_code
from tests.compile.test_block_sparse_kernels import ALL, SPILL_ALLOWED
from tests.compile.test_hopper_forms import FEATURES, is_rare

KINDS = {"sparse": masks.sliding_window(300), "causal": masks.causal(), "dense": None}
KERNELS = ["delta_kernel", "backward_kv_gluon_kernel", "backward_q_gluon_kernel"]
LENGTH, HEADS, KV_HEADS = 1024, 4, 2


@dataclasses.dataclass(frozen=True)
class Launch:
    """Gradients, of grouped heads unless said otherwise."""

    dim: int
    kind: str
    block: int = 128
    v_dim: int = 0  # 0: dim
    dtype: torch.dtype = torch.bfloat16
    deterministic: bool = False
    grouped: bool = True
    feature: str = ""  # one of FEATURES

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"D{self.dim}" + (f"-DV{self.v_dim}" if self.v_dim else "")
        again = "-deterministic" if self.deterministic else ""
        again += "" if self.grouped else "-ungrouped"
        extras = again + (f"-{self.feature}" if self.feature else "")
        return f"gluon-backward-{shape}-{self.kind}{self.block}-{dtype}{extras}"

    def run(self) -> None:
        """Call the launcher on CPU tensors."""
        query = torch.zeros(1, HEADS, LENGTH, self.dim, dtype=self.dtype)
        kv_heads = KV_HEADS if self.grouped else HEADS
        key = torch.zeros(1, kv_heads, LENGTH, self.dim, dtype=self.dtype)
        value = torch.zeros(1, kv_heads, LENGTH, self.v_dim or self.dim, dtype=self.dtype)
        shape = (1, 1, LENGTH, LENGTH)
        mask = masks.compile_mask(KINDS[self.kind], *shape, device="cpu", block_size=self.block)
        out = torch.zeros(1, HEADS, LENGTH, value.shape[-1], dtype=self.dtype)
        lse = torch.zeros(1, HEADS, LENGTH)
        given = FEATURES.get(self.feature, {})
        residual = torch.zeros_like(lse) if "bias" in given else lse.new_zeros(0)
        call = Call(query, key, value, mask, 0.125, deterministic=self.deterministic, **given)
        backward(call, Saved(out, lse, residual), out, None)


LAUNCHES = [
    *(Launch(d, k) for d, k in itertools.product((64, 128), ("sparse", "causal"))),
    Launch(128, "dense", deterministic=True),
    Launch(64, "sparse", 64),
    Launch(72, "sparse", 128, 40, torch.float16),
    *(
        Launch(d, k, feature=x)
        for (d, k), x in itertools.product(
            ((64, "causal"), (128, "sparse")),
            ("softcap", "offset", "lengths", "relative", "dense", "dropout"),
        )
    ),
]


# bytes at D = 128, by feature: a bias spills at the ends of lines alone, dropout within its loops
SPILLED = {"": 8, "softcap": 40, "relative": 88, "dense": 88, "dropout": 144}


def spill_allowed(launch: Launch) -> int:
    """Bytes that may be spilled: at D = 128 two warpgroups hold all registers of a multiprocessor,
    and what the tiles of a mask, or a feature, keep through a loop is a few more.
    """
    wide = launch.dim == 128 and launch.kind == "sparse"
    return max(SPILL_ALLOWED, SPILLED.get(launch.feature, SPILLED[""]) if wide else 0)


@pytest.mark.parametrize("launch", [x for x in LAUNCHES if ALL or not is_rare(x)], ids=str)
def test_form(launch):
    with compiling_for(90) as launches:
        launch.run()
    assert [name for name, _ in launches] == KERNELS
    for name, kernel in launches[1:]:
        assert budgets.complaints(str(launch), name, kernel) == []
        report, code = inspect(name, kernel), machine_code.disassemble(kernel.asm["cubin"])
        assert report.spilled <= spill_allowed(launch), report
        assert report.shared <= SHARED_MEMORY[90], report
        assert report.hgmma > 0 and report.hmma == 0, report
        assert not machine_code.serialised(code)
        assert code.count("UTMALDG") > 0 and code.count("USETMAXREG") > 0


@pytest.mark.parametrize("pass_", ["backward_kv", "backward_q"])
def test_tiles_divide_the_blocks_of_a_mask(pass_):
    for block in itertools.product((64, 128), repeat=2):
        config = configs.hopper_backward(pass_, block)
        assert block[0] % config.block_m == 0 and block[1] % config.block_n == 0
