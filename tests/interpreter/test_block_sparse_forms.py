"""The Hopper form of the block-sparse forward kernel: against the definition, against the pointer
form, and what they refuse.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from flashmark import masks, reference
from flashmark.block_sparse.call import Call as SparseCall
from flashmark.kernels.block_sparse import configs, forms, forward
from flashmark.kernels.block_sparse.arguments import describe
from tests.helpers import assert_close, relative_error
from tests.interpreter import gluon_emulation
from tests.interpreter.attention_cases import Call, Case
from tests.interpreter.running import INTERPRETED

HALF = torch.float16


@pytest.fixture(params=["gluon"])
def form(request, device, monkeypatch):
    if device.type == "cpu":  # a program computes several lines
        monkeypatch.setattr(configs, "processors", lambda device: 2)
    if INTERPRETED:
        with gluon_emulation.emulated():
            yield request.param
    elif configs.device_arch(device) == 90:
        yield request.param
    else:
        pytest.skip("the Hopper form needs compute capability 9.0")


@contextlib.contextmanager
def on_architecture(arch: int) -> Iterator[None]:
    """A device of another compute capability, for a part of a test that `form` goes around."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "device_arch", lambda device: arch)
        yield


def run(form: str, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward pass with the config that ships for the form."""
    case, mask = call.case, call.mask
    block = (mask.block_q, mask.block_kv) if mask.kind == "sparse" else None
    dim = max(case.dim, case.v_dim or 0)
    extras = case.bias is not None or case.dropout_p > 0
    with configs.using(forward=configs.hopper(form, dim, block, extras)):
        return call.forward()


def check(form: str, case: Case, device: torch.device) -> None:
    """Output and lse are as close to the definition as those of the pointer form must be."""
    case = dataclasses.replace(case, dtype=case.dtype if case.dtype != torch.float32 else HALF)
    call = Call(case, device)
    expected = call.reference()
    budget = call.budget(expected)
    for name, tensor in zip(("out", "lse"), run(form, call), strict=True):
        error = relative_error(tensor, expected[name])
        assert error <= budget[name], f"{name}: error {error:.2e}, allowed {budget[name]:.2e}"


def random_bits(*shape: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


MASKS = {
    "dense": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(70),
    "prefix": masks.prefix(11) | masks.causal(),
    "documents": masks.causal() & masks.documents(torch.arange(150) // 67),
    "random-bits": masks.dense(random_bits(150, 150)),
    "nothing": masks.blocks(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 64),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(form, name, device):
    check(form, Case(mask=MASKS[name], kv_heads=1, q_len=150, dim=32, block=64), device)


@pytest.mark.parametrize("q_len", [1, 17, 127, 129, 200])
def test_lengths(form, q_len, device):
    """Tiles of 128 queries and 128 keys, the last one ragged."""
    for mask in (masks.causal(), masks.sliding_window(150)):
        check(form, Case(mask=mask, heads=1, q_len=q_len, block=128), device)


@pytest.mark.parametrize("shape", [(70, 200), (200, 70)], ids=str)
def test_fewer_or_more_keys_than_queries(form, shape, device):
    for mask in (masks.causal(), masks.sliding_window(50)):
        q_len, kv_len = shape
        case = Case(mask=mask, heads=1, q_len=q_len, kv_len=kv_len, block=64)
        check(form, case, device)


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (72, 40), (128, 128), (8, 24)], ids=str)
def test_head_dimensions(form, dims, device):
    dim, v_dim = dims
    mask = masks.sliding_window(90)
    check(form, Case(mask=mask, heads=1, q_len=70, dim=dim, v_dim=v_dim, block=64), device)


def test_bfloat16(form, device):
    for mask in (masks.causal(), masks.sliding_window(90)):
        case = Case(mask=mask, heads=1, q_len=100, dim=64, block=64, dtype=torch.bfloat16)
        check(form, case, device)


@pytest.mark.parametrize("block", [128, (128, 64), (64, 128), (64, 32)], ids=str)
def test_runs_of_full_tiles(form, block, device):
    """Lines whose full tiles come in several runs, lines that have none, and one that is empty."""
    tiles = random_bits(1, 1, 2, 5, density=0.6, seed=3)
    tiles[..., 1, :] = False
    mask = masks.blocks(tiles, 128) & masks.mask_mod(lambda b, h, i, j: (j < 384) | (i + j < 600))
    check(form, Case(mask=mask, heads=1, q_len=256, kv_len=640, block=block), device)


@pytest.mark.parametrize("q_len", [520, 700], ids=str)
def test_more_tiles_than_stages(form, q_len, device):
    """The widest heads: up to four FULL tiles to a line, an even number and an odd one."""
    mask = masks.causal() & masks.sliding_window(600)
    check(form, Case(mask=mask, heads=1, q_len=q_len, dim=128, v_dim=128, block=128), device)


def test_fully_masked_rows(form, device):
    visible = random_bits(1, 2, 140, 140)
    visible[:, 1] = False
    visible[:, :, 20:100] = False
    case = Case(mask=masks.dense(visible), q_len=140, block=64)
    check(form, case, device)
    out, lse = run(form, Call(dataclasses.replace(case, dtype=HALF), device))
    assert (out[:, 1] == 0).all() and (lse[:, 1] == float("-inf")).all()
    assert (out[:, 0, 20:100] == 0).all()


def test_per_sample_and_head_masks_with_grouped_heads(form, device):
    mask = masks.dense(random_bits(2, 4, 70, 70))
    check(form, Case(mask=mask, batch=2, heads=4, kv_heads=2, q_len=70, block=64), device)


def test_sinks_and_a_negative_scale(form, device):
    mask = masks.causal() & ~masks.prefix(20)
    check(form, Case(mask=mask, q_len=90, block=64, sinks=True), device)
    check(form, Case(mask=masks.causal(), q_len=90, sinks=True, scale=-0.3), device)


@pytest.mark.parametrize("name", ["causal", "random-bits"])
def test_lazy_rescaling(form, name, device):
    """Scores far apart, so that maxima grow by more than the slack, and by less."""
    case = Case(mask=MASKS[name], q_len=150, block=64, dtype=HALF, sinks=True)
    call = Call(case, device, magnitude=6.0)
    expected = call.reference()
    budget = call.budget(expected)
    lazy = dataclasses.replace(configs.hopper("gluon", 64, (64, 64)), block_n=32, lazy=True)
    with configs.using(forward=lazy):
        got = call.forward()
    for key, tensor in zip(("out", "lse"), got, strict=True):
        assert relative_error(tensor, expected[key]) <= budget[key], key


def test_lazy_rescaling_is_of_the_hopper_form():
    with pytest.raises(ValueError, match="lazy: expected the form 'gluon', got 'pointers'"):
        configs.Config(128, 64, 4, 2, "pointers", lazy=True)


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
def test_strides(form, layout, device):
    case = Case(mask=MASKS["window"], batch=2, heads=2, kv_heads=1, q_len=70, block=64, dim=32)
    call = Call(dataclasses.replace(case, layout=layout, dtype=HALF), device)
    if layout == "gaps":
        with pytest.raises(ValueError, match="strides of whole 16 bytes, got"):
            run(form, call)
    else:
        check(form, call.case, device)


@pytest.mark.parametrize("name", ["dense", "causal", "documents"])
def test_agrees_with_the_pointer_form(form, name, device):
    call = Call(Case(mask=MASKS[name], heads=1, q_len=150, block=64, dtype=HALF), device)
    out, lse = call.forward()
    form_out, form_lse = run(form, call)
    assert_close(form_out, out, 2e-3)
    assert_close(form_lse, lse, 1e-5)


def test_a_key_or_value_of_the_future_changes_nothing(form, device):
    call = Call(Case(mask=masks.causal(), heads=1, q_len=150, dtype=HALF), device)
    out, lse = run(form, call)
    call.query[..., 101:, :] = float("nan")
    call.key[..., 101:, :] = float("inf")
    call.value[..., 101:, :] = 6e4
    poisoned_out, poisoned_lse = run(form, call)
    assert torch.equal(poisoned_out[..., :101, :], out[..., :101, :])
    assert torch.equal(poisoned_lse[..., :101], lse[..., :101])


PAST = masks.causal() & ~masks.prefix(20)
FEATURES = {
    "softcap": Case(mask=PAST, softcap=2.0, sinks=True),
    "softcap-causal": Case(mask=masks.causal(), softcap=2.0, dtype=torch.bfloat16),
    "relative-bias": Case(mask=PAST, bias=(2, 139), sinks=True),
    "relative-bias-causal": Case(mask=masks.causal(), q_len=150, bias=(2, 299), kv_heads=1),
    "dense-bias": Case(mask=PAST, bias=(1, 2, 70, 70)),
    "bias-of-keys": Case(bias=(1, 1, 1, 70)),
    "query-offset": Case(mask=PAST, query_offset=(65,), q_len=60, rows=140, kv_len=140),
    "query-offset-causal": Case(
        mask=masks.causal(), batch=2, query_offset=(3, 70), q_len=66, rows=140, kv_len=140
    ),
    "kv-lengths": Case(batch=3, heads=1, kv_lengths=(0, 45, 70)),
    "kv-lengths-causal": Case(mask=masks.causal(), batch=2, q_len=150, kv_lengths=(133, 150)),
    "kv-lengths-sparse": Case(
        mask=masks.causal() & masks.sliding_window(190), batch=3, heads=1, q_len=250,
        kv_lengths=(0, 130, 221),
    ),
    "offset-and-lengths": Case(
        mask=masks.sliding_window(100), batch=2, heads=1, q_len=70, rows=200, kv_len=200,
        query_offset=(10, 130), kv_lengths=(80, 200), bias=(1, 399),
    ),
    "dropout": Case(mask=PAST, dropout_p=0.3, kv_heads=1, sinks=True),
    "dropout-offset-causal": Case(
        mask=masks.causal(), batch=2, query_offset=(3, 70), q_len=66, rows=140, kv_len=140,
        dropout_p=0.2, bias=(2, 279),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_feature(form, name, device):
    case = FEATURES[name]
    check(form, dataclasses.replace(case, block=64, v_dim=24), device)


def test_a_bias_of_minus_1e9_on_every_key_leaves_a_mean(form, device):
    case = Case(heads=1, q_len=70, dim=72, v_dim=24, bias=(1, 1, 70, 70), dtype=HALF, block=64)
    call = Call(case, device)
    call.bias[:, :, 20:40] = -1e9
    expected = call.reference()
    out, lse = run(form, call)
    assert relative_error(out, expected["out"]) <= call.budget(expected)["out"]
    assert_close(lse[:, :, 20:40], torch.full_like(lse[:, :, 20:40], -1e9), 1e-6)


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_dropout_keeps_what_the_definition_says(form, seed, device):
    """With equal scores and one-hot values, the output shows the mask of every key."""
    shape, p = (2, 2, 104, 104), 0.4
    query = torch.zeros(2, 2, 104, 16, dtype=HALF, device=device)
    value = torch.eye(104, dtype=HALF, device=device).expand(shape).contiguous()
    mask = masks.compile_mask(PAST, *shape, device=device, block_size=64)
    seeds = torch.tensor([seed], device=device)
    call = SparseCall(query, query, value, mask, 1.0, dropout_seed=seeds, dropout_p=p)
    keep = reference.dropout_keep(seed, p, *shape, device)
    with configs.using(forward=configs.hopper(form, 128, (64, 64), True)):
        assert torch.equal(forward(call).out > 0, keep & mask.to_dense())


def test_gradients_of_the_pointer_form_keep_what_the_forward_did(form, device):
    call = Call(dataclasses.replace(FEATURES["dropout"], dtype=HALF, block=64, dim=16), device)
    expected = call.reference()
    budget = call.budget(expected)
    out, lse = run(form, call)
    with configs.pointer_forms():
        got = call.backward(out, lse, True)
    for name, tensor in got.items():
        assert relative_error(tensor, expected[name]) <= budget[name], name


PLAIN = Case(mask=masks.sliding_window(30), dtype=HALF, block=64)


@pytest.mark.parametrize("name", ["plain", *FEATURES])
def test_the_form_is_the_default_on_hopper(form, name, device):
    case = FEATURES.get(name, PLAIN)
    call = Call(dataclasses.replace(case, dtype=HALF, block=64, v_dim=24), device)
    described = describe(call.checked())
    tensors = (call.query, call.key, call.value)
    assert forms.choose_forward(*tensors, described).form == form
    with on_architecture(80):
        assert forms.choose_forward(*tensors, described).form == "pointers"
    with configs.pointer_forms():
        assert forms.choose_forward(*tensors, described).form == "pointers"


REFUSED = {
    "dtype": (Case(), ValueError, "query: expected float16 or bfloat16, got torch.float32"),
    "head dimension": (Case(dim=136), ValueError, "head dimension of at most 128, got 136"),
    "width of a row": (Case(dim=20), ValueError, r"whole 16 bytes, got \[.*\] bytes"),
    "blocks": (Case(block=32), ValueError, r"blocks of at least \(64, 32\), got \(32, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_form_cannot_do_is_refused_or_left_to_the_other(form, name, device):
    case, error, message = REFUSED[name]
    dtype = torch.float32 if name == "dtype" else HALF
    block = case.block if name == "blocks" else 64
    call = Call(dataclasses.replace(case, mask=PLAIN.mask, block=block, dtype=dtype), device)
    with pytest.raises(error, match=message):
        run(form, call)
    described = describe(call.checked())
    chosen = forms.choose_forward(call.query, call.key, call.value, described)
    assert chosen.form == "pointers"


def test_rows_of_the_output_that_no_descriptor_takes_go_to_the_pointer_form(form, device):
    call = Call(dataclasses.replace(PLAIN, v_dim=24), device)
    call.value = call.value.new_zeros(*call.value.shape[:3], 32)[..., :20]
    with pytest.raises(ValueError, match="value: expected rows of whole 16 bytes, got 40"):
        run(form, call)
    described = describe(call.checked())
    assert forms.choose_forward(call.query, call.key, call.value, described).form == "pointers"


def test_the_question_and_the_message_are_one(device):
    call = Call(PLAIN, device)
    tensors = (call.query, call.key, call.value)
    described = describe(call.checked())
    assert forms.can_use_form("pointers", *tensors, described)
    with on_architecture(80):
        assert not forms.can_use_form("gluon", *tensors, described)
        with pytest.raises(NotImplementedError, match="expected compute capability 9.0, got 80"):
            forms.can_use_form("gluon", *tensors, described, raise_error=True)
        with pytest.raises(ValueError, match="form: expected one of pointers, .*, got 'tma'"):
            forms.can_use_form("tma", *tensors, described, raise_error=True)
    aside = call.query.new_zeros(call.query.numel() + 1)[1:].view_as(call.query)
    message = "query: expected data that starts at a multiple of 16"
    with on_architecture(90), pytest.raises(ValueError, match=message):
        forms.can_use_form("gluon", aside, *tensors[1:], described, raise_error=True)


def test_the_emulation_reports_a_deadlock():
    """Two programs that wait for each other raise an error, so wrong barriers would be seen."""
    crew = gluon_emulation.Crew(0)
    mbarrier = gluon_emulation.stand_ins(crew)["mbarrier"]
    barriers = [gluon_emulation.Barrier() for _ in range(2)]
    for barrier in barriers:
        mbarrier.init(barrier, count=2)

    def meet(mine: int, theirs: int) -> None:
        mbarrier.arrive(barriers[mine], count=1)
        mbarrier.wait(barriers[theirs], 0)

    with pytest.raises(RuntimeError, match="deadlock"):
        crew.run([(meet, (0, 1)), (meet, (1, 0))])
