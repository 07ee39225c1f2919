"""Kernels go through Triton's own launcher: arguments, grids, failures and tensor maps, without a
GPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from flashmark import masks
from flashmark.block_sparse.call import Call, Saved
from flashmark.kernels import block_sparse, nystrom
from flashmark.kernels.block_sparse import arguments, configs, forms
from flashmark.nystrom.call import Call as NystromCall
from tests.compile.driver import stub

pytestmark = pytest.mark.skipif(stub.why_not() is not None, reason=str(stub.why_not()))

HEADS, LENGTH, DIM = 4, 512, 64


@pytest.fixture
def driver():
    with stub.launching() as library:
        yield library


@pytest.fixture
def counter():
    """The driver, for kernels that are launched and not compiled."""
    with stub.launching(code=False) as library:
        yield library


@triton.jit(do_not_specialize=["n"])
def nested_kernel(first, pair, n, absent, deep, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(first + offs) + tl.load(pair[0] + offs) + n
    if absent is None and deep[1][1] is None:
        tl.store(deep[1][0] + offs * deep[0], x * pair[1])


def tensors(*heads: int, length: int = LENGTH, dim: int = DIM) -> list[torch.Tensor]:
    return [torch.zeros(1, h, length, dim, dtype=torch.bfloat16) for h in heads]


def make_call(query, key, value, expression=None, **options) -> Call:
    q_len, kv_len = query.shape[2], key.shape[2]
    expression = masks.causal() if expression is None else expression
    mask = masks.compile_mask(expression, 1, 1, q_len, kv_len, device="cpu")
    return Call(query, key, value, mask, 0.125, **options)


def kernels_of(driver, run) -> list[str]:
    """Names of the kernels that a call launches."""
    names, launch = [], triton.compiler.CompiledKernel.launch_metadata

    def note(kernel, *arguments):
        names.append(kernel.name)
        return launch(kernel, *arguments)

    before = driver.stub_launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.compiler.CompiledKernel, "launch_metadata", note)
        run()
    assert driver.stub_launches() - before == len(names)
    return names


def test_nested_tuples_and_none_arrive_flat(driver):
    a, b, c = (torch.zeros(64) for _ in range(3))
    driver.stub_keep(6)
    nested_kernel[(7, 5, 3)](a, (b, 2.0), 11, None, (3, (c, None)), SIZE=64, num_warps=2)
    assert stub.last_launch() == stub.Launch("nested_kernel", (7, 5, 3), 64, 0)
    got = [driver.stub_parameter(i) for i in range(6)]
    assert [got[0], got[1], got[5]] == [a.data_ptr(), b.data_ptr(), c.data_ptr()]
    small = torch.tensor([got[2] & 0xFFFFFFFF], dtype=torch.int64).to(torch.int32)
    assert small.view(torch.float32).item() == 2.0
    assert [got[3] & 0xFFFFFFFF, got[4] & 0xFFFFFFFF] == [11, 3]


def test_forward_gets_its_operands_and_grid(driver):
    query, key, value = tensors(HEADS, 2, 2)
    driver.stub_keep(3)
    config = configs.choose(90, torch.bfloat16, DIM, None, "forward")
    with configs.using(forward=config):
        block_sparse.forward(make_call(query, key, value))
    launch = stub.last_launch()
    assert launch.kernel == "forward_kernel"
    assert launch.grid == (HEADS * LENGTH // config.block_m, 1, 1)
    assert launch.threads == 32 * config.num_warps
    pointers = [driver.stub_parameter(i) for i in range(3)]
    assert pointers == [x.data_ptr() for x in (query, key, value)]


def test_the_forward_runs_as_many_programs_as_fit(counter):
    for length, programs in ((LENGTH, HEADS * LENGTH // 128), (128 * 132, 132)):
        query, key, value = tensors(HEADS, 2, 2, length=length)
        block_sparse.forward(make_call(query, key, value))
        launch = stub.last_launch()
        assert launch.kernel == "forward_gluon_kernel"
        assert launch.grid == (programs, 1, 1)


POINTERS = ["delta_kernel", "backward_kv_kernel"]
IN_GLUON = ["delta_kernel", "backward_kv_gluon_kernel", "backward_q_gluon_kernel"]
BACKWARD = {
    "two-pass": (configs.pointer_forms, True, [*POINTERS, "backward_q_kernel"]),
    "one-pass": (configs.pointer_forms, False, POINTERS),
    "gluon": (contextlib.nullcontext, False, IN_GLUON),
    "gluon-deterministic": (contextlib.nullcontext, True, IN_GLUON),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_launches(counter, name):
    allowed, deterministic, expected = BACKWARD[name]
    query, key, value = tensors(HEADS, 2, 2)
    lse = torch.zeros(1, HEADS, LENGTH)
    window = masks.sliding_window(100)
    call = make_call(query, key, value, window, deterministic=deterministic)
    saved = Saved(query, lse, lse.new_zeros(0))
    with allowed():
        names = kernels_of(counter, lambda: block_sparse.backward(call, saved, query, None))
    assert names == expected


def test_a_decoding_step_is_two_launches(counter):
    (query,), (key, value) = tensors(HEADS, length=1), tensors(2, 2, length=4096)
    offset, lengths = torch.tensor([4000], dtype=torch.int32), torch.tensor([4001])
    whole = masks.compile_mask(masks.causal(), 1, 1, 4096, 4096, device="cpu")
    options = {"query_offset": offset, "kv_lengths": lengths.int()}
    call = Call(query, key, value, whole, 0.125, **options)
    names = kernels_of(counter, lambda: block_sparse.forward(call))
    assert names == ["decode_kernel", "merge_kernel"]


def test_nystrom_launches(counter):
    (x,), marks, core = tensors(2), torch.zeros(2, 32, DIM), torch.zeros(2, 32, 32)
    call = NystromCall(x, x, x, marks, marks, core, 0.125)
    names = kernels_of(counter, lambda: nystrom.forward(call))
    assert "output_kernel" in names


def test_a_launch_that_fails_raises_and_the_next_one_runs(driver):
    call = make_call(*tensors(HEADS, 2, 2))
    block_sparse.forward(call)
    driver.stub_fail(stub.CODE_OF_A_FAILURE)
    with pytest.raises(RuntimeError, match="refused by the stub driver"):
        block_sparse.forward(call)
    block_sparse.forward(call)


def laid_out(name: str) -> torch.Tensor:
    """Keys (1, 2, LENGTH, DIM) in bfloat16, in memory as the name says."""
    heads, half = 2, torch.bfloat16
    if name == "tokens-first":
        return torch.zeros(1, LENGTH, heads, DIM, dtype=half).transpose(1, 2)
    if name == "rows-8-apart":
        return torch.zeros(1, heads, LENGTH, DIM + 8, dtype=half)[..., :DIM]
    if name == "rows-4-apart":
        return torch.zeros(1, heads, LENGTH, DIM + 4, dtype=half)[..., :DIM]
    if name == "starts-at-2-bytes":
        flat = torch.zeros(heads * LENGTH * DIM + 1, dtype=half)[1:]
        return flat.view(1, heads, LENGTH, DIM)
    return torch.zeros(1, heads, LENGTH, DIM, dtype=half)


LAYOUTS = ("contiguous", "tokens-first", "rows-8-apart", "rows-4-apart", "starts-at-2-bytes")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_hopper_form_takes_what_a_tensor_map_takes(driver, name, monkeypatch):
    query, key = tensors(HEADS)[0], laid_out(name)
    call = make_call(query, key, key)
    described = arguments.describe(call)
    allowed = forms.can_use_form("gluon", query, key, key, described)
    default = forms.choose_forward(query, key, key, described).form
    assert default == ("gluon" if allowed else "pointers")
    monkeypatch.setattr(forms, "_misfit", lambda tensor: None)
    maps = driver.stub_tensor_maps()
    with configs.using(forward=configs.hopper("gluon", DIM)):
        if allowed:
            block_sparse.forward(call)
            assert stub.last_launch().kernel == "forward_gluon_kernel"
            assert driver.stub_tensor_maps() - maps == 4
        else:
            with pytest.raises((AssertionError, RuntimeError)):
                block_sparse.forward(call)


def gradients_of(name: str) -> None:
    query, key = tensors(HEADS)[0], laid_out(name)
    lse = torch.zeros(1, HEADS, LENGTH)
    call = make_call(query, key, key)
    block_sparse.backward(call, Saved(query, lse, lse.new_zeros(0)), query, None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_in_gluon_take_what_a_tensor_map_takes(counter, name):
    names = kernels_of(counter, lambda: gradients_of(name))
    fits = name in ("contiguous", "tokens-first", "rows-8-apart")
    assert names == IN_GLUON if fits else set(names) & set(IN_GLUON) == {"delta_kernel"}


def test_gradients_in_gluon_make_their_tensor_maps(driver):
    maps = driver.stub_tensor_maps()
    gradients_of("contiguous")
    # Q, dO, lse, Delta, K and V; then all but lse and Delta
    assert driver.stub_tensor_maps() - maps == 10


def test_some_layouts_are_allowed_and_some_refused(driver):
    allowed = []
    for name in LAYOUTS:
        query, key = tensors(HEADS)[0], laid_out(name)
        if forms.can_use_form(
            "gluon", query, key, key, arguments.describe(make_call(query, key, key))
        ):
            allowed.append(name)
    assert allowed == ["contiguous", "tokens-first", "rows-8-apart"]
