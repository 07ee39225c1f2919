"""Every config that can be chosen compiles, fits, does not spill, and uses the tensor cores."""

from __future__ import annotations

import os

import pytest
import torch
import triton

from bench.offline import SHARED_MEMORY, compiling_for, inspect, parse_target
from flashmark.kernels.block_sparse import arguments, configs
from tests.compile import budgets
from tests.compile.block_sparse_launches import HALF, SINGLE, Launch, all_launches

# other versions of Triton and ptxas keep a few more values alive than those of the configs' choice
CHOSEN_WITH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) and not os.environ.get(
    "TRITON_PTXAS_PATH"
)
SPILL_ALLOWED = 0 if CHOSEN_WITH else 64
# bytes that float32 kernels with the bits of a tile in registers spill; they may only get fewer
FLOAT32_SPILLS = {
    "forward-fp32-D128-block128-plain": 8,
    "decode-fp32-D64-block128-plain": 8,
    "decode-tf32-D64-block128-plain": 16,
    "two-pass-grouped-tf32-D128-block128-plain": 24,
}
ALL = "FLASHMARK_COMPILE_TARGETS" in os.environ
TARGETS = os.environ.get("FLASHMARK_COMPILE_TARGETS", "sm_90").split(",")


# what stands for its siblings, by width of the head: (pass, kind of block or feature)
PASSES = ("forward", "jvp", "two-pass", "one-pass", "decode")
STANDING = {
    64: {(pass_, "plain") for pass_ in PASSES},
    128: {(pass_, "plain") for pass_ in PASSES}
    | {(pass_, "relative") for pass_ in ("forward", "two-pass", "decode")}
    | {("forward", "causal"), ("decode", "dropout"), ("forward", 32)},
    256: {("forward", "causal")},
}
STANDING_IN_FLOAT32 = {(pass_, "plain") for pass_ in ("forward", "decode")}


def is_rare(launch: Launch) -> bool:
    """Whether a launch is compiled only where targets are named: on Hopper forms of its own stand
    before most of these kernels, and a sibling for each.
    """
    kind = launch.feature
    if launch.block != 128:
        kind = launch.block or "causal"
    if launch.dtype == SINGLE:
        return launch.dim == 64 or (launch.pass_, kind) not in STANDING_IN_FLOAT32
    return (launch.pass_, kind) not in STANDING.get(launch.dim, ())


@pytest.mark.parametrize("launch", [x for x in all_launches() if ALL or not is_rare(x)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel(target, launch):
    arch = parse_target(target)
    with compiling_for(arch) as launches:
        launch.run()
    reports = [inspect(*each) for each in launches]
    assert reports
    if arch == 90:
        for name, kernel in launches:
            assert budgets.complaints(str(launch), name, kernel) == []
    for report in reports:
        assert report.shared <= SHARED_MEMORY[arch], report
        if arch == 90 and launch.dim <= 128:
            allowed = max(SPILL_ALLOWED, FLOAT32_SPILLS.get(str(launch), 0))
            assert report.spilled <= allowed, report
        if report.kernel in ("delta_kernel", "merge_kernel") or launch.dtype != HALF:
            continue
        if arch == 90 and (launch.block or 128) >= 64 and launch.pass_ != "decode":
            assert report.hgmma > 0, report
        elif arch in (80, 90):
            assert report.hgmma + report.hmma > 0, report


def test_a_config_is_a_plain_record():
    config = configs.choose(90, torch.bfloat16, 128, (128, 128), "forward")
    assert config == configs.choose(90, torch.float16, 128, None, "forward")
    assert (config.block_m, config.block_n, config.num_warps) == (128, 64, 8)


def test_registers_are_capped_on_hopper_alone():
    """Elsewhere the same cap would spill, and AMD's compiler knows none."""
    chosen = {
        arch: configs.choose(arch, HALF, 64, None, "backward_q")
        for arch in (80, 89, 90, 100, "gfx942")
    }
    capped = {arch for arch, config in chosen.items() if "maxnreg" in config.options}
    assert capped == {90} and chosen[90].options["maxnreg"] == 128
    with compiling_for(90, lambda name, _: name == "backward_q_kernel") as launches:
        Launch("two-pass", 64).run()
    assert [inspect(*each).registers <= 128 for each in launches] == [True]


def test_launches_reach_every_config_of_the_tuned_blocks():
    """Configs left out of the list above differ in nothing that a kernel is compiled for."""
    chosen = {
        configs.choose(90, HALF, d, b, p, extras)
        for d in (64, 128)
        for b in (None, (64, 64), (128, 128))
        for p in configs.PASSES
        for extras in (False, True)
    }
    reached = set()
    choose = configs.choose

    def noting(*args):
        reached.add(choose(*args))
        return choose(*args)

    with compiling_for(90), pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "choose", noting)
        patch.setattr("triton.runtime.jit.JITFunction.run", lambda *args, **kwargs: None)
        for launch in all_launches():
            launch.run()
    assert chosen <= reached


SETTINGS = {  # of float32 products: all of PyTorch, those of matmul, ours
    "nothing": ("none", "none", "ieee"),
    "matmul-tf32": ("none", "tf32", "tf32"),
    "all-tf32": ("tf32", "none", "tf32"),
    "all-tf32-but-matmul": ("tf32", "ieee", "ieee"),
}


@pytest.fixture
def precision():
    """PyTorch's settings of float32 products, as they were at first afterwards."""
    yield torch.backends
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("name", SETTINGS)
def test_float32_products_are_as_exact_as_those_of_pytorch(name, precision):
    precision.fp32_precision, precision.cuda.matmul.fp32_precision, expected = SETTINGS[name]
    assert arguments.dot_precision(SINGLE) == expected
    assert arguments.dot_precision(HALF) == "tf32"


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
def test_float32_products_follow_the_setting_that_is_older(legacy, precision):
    torch.set_float32_matmul_precision(legacy)
    assert arguments.dot_precision(SINGLE) == ("ieee" if legacy == "highest" else "tf32")
