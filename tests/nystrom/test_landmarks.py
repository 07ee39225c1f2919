"""Landmarks: cores, their gradients, initialisation, parameter groups."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashmark import native, nystrom_attention, reference
from flashmark.nystrom import landmark_core as landmarks
from flashmark.nystrom.landmark_core import (
    init_landmarks,
    landmark_core,
    landmark_parameter_groups,
    mark_landmarks,
)
from tests import helpers

pytestmark = pytest.mark.filterwarnings("ignore:untied landmarks")


def attention(X, Y, scale=None):
    scale = X.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * X @ Y.mT, -1)


def marks(*shape, seed=0, dtype=torch.float32):
    return helpers.randn(*shape, seed=seed, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 8, 16), (3, 2, 64, 32), (1, 200, 64)], ids=str)
def test_the_tied_core_inverts_the_landmarks_attention(shape):
    X = marks(*shape, dtype=torch.float64)
    core = landmark_core(X, jitter=1e-12)
    assert core.shape == (*shape[:-1], shape[-2])
    eye = torch.eye(shape[-2], dtype=torch.float64).expand_as(core)
    helpers.assert_close(core @ attention(X, X), eye, 1e-6)


@pytest.mark.parametrize("method", ["cholesky", "tikhonov"])
@pytest.mark.parametrize("jitter", [1e-4, 1e-1])
def test_rows_of_the_core_sum_to_one_whatever_the_jitter(method, jitter):
    X = marks(4, 32, 16)
    X[1] = X[1, :1]  # all landmarks of a head alike: singular without jitter
    core = landmark_core(X, method=method, jitter=jitter)
    largest = core.abs().amax(-1)
    assert largest.isfinite().all()
    assert ((core.sum(-1) - 1).abs() <= 1e-6 * largest.clamp_min(1)).all()


def test_float32_core_agrees_with_float64():
    X = init_landmarks(4, 64, 64)
    helpers.assert_close(landmark_core(X), landmark_core(X.double()), 1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        half = X.to(dtype)
        assert landmark_core(half).dtype == torch.float32
        helpers.assert_close(landmark_core(half), landmark_core(half.double()), 1e-5)


@pytest.mark.parametrize("normalize", ["landmark", "mass"])
@pytest.mark.parametrize("pair", [False, True], ids=["tied", "pair"])
def test_defaults_are_those_of_the_reference(pair, normalize):
    X, Y = marks(2, 13, 16, dtype=torch.float64), marks(2, 13, 16, seed=1, dtype=torch.float64)
    Y = Y if pair else None
    kind = "softmax" if normalize == "landmark" else "kernel"
    wanted = reference.landmark_core(X, Y, normalize=normalize)
    helpers.assert_close(landmark_core(X, Y, kind=kind), wanted, 1e-9)


def test_the_kernel_core_inverts_the_unit_diagonal_kernel():
    X = marks(2, 8, 16, dtype=torch.float64)
    S = torch.exp(X @ X.mT / 4)
    root = S.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = S / root[:, :, None] / root[:, None]
    core = landmark_core(X, kind="kernel", jitter=0.01)
    eye = torch.eye(8, dtype=torch.float64)
    helpers.assert_close(core @ (unit + 0.01 * eye), eye.expand_as(core), 1e-10)


def test_landmarks_far_from_the_origin_do_not_overflow():
    X = marks(2, 16, 16) * 20.0  # scores up to 1e4
    for kind in ("softmax", "kernel"):
        assert landmark_core(X, kind=kind).isfinite().all()


def test_tikhonov_recovers_the_inverse_of_a_well_conditioned_pair():
    X = 3 * torch.eye(16, dtype=torch.float64)[None]
    Y = X + 0.01 * marks(1, 16, 16, dtype=torch.float64)
    core = landmark_core(X, Y, scale=1.0, jitter=1e-12)
    wanted = torch.linalg.inv(attention(X, Y, 1.0))
    helpers.assert_close(core, wanted, 1e-6)


def test_newton_schulz_is_the_published_iteration():
    X, Y = marks(2, 8, 16), marks(2, 8, 16, seed=1)
    A = attention(X, Y)
    Z = A.mT / A.sum(-2).amax(-1)[:, None, None]
    eye = torch.eye(8)
    for _ in range(3):
        Z = 0.25 * Z @ (13 * eye - A @ Z @ (15 * eye - A @ Z @ (7 * eye - A @ Z)))
    helpers.assert_close(landmark_core(X, Y, method="newton_schulz", iterations=3), Z, 1e-5)
    well = 3 * torch.eye(8)[None]
    core = landmark_core(well, method="newton_schulz", iterations=12, scale=1.0)
    helpers.assert_close(core, torch.linalg.inv(attention(well, well, 1.0)), 1e-4)


def test_identity():
    core = landmark_core(marks(2, 8, 16), method="identity")
    assert torch.equal(core, torch.eye(8).expand(2, 8, 8))


@pytest.mark.parametrize("kind", ["softmax", "kernel"])
@pytest.mark.parametrize("method", ["cholesky", "tikhonov", "newton_schulz"])
@pytest.mark.parametrize("pair", [False, True], ids=["tied", "pair"])
def test_gradients(method, kind, pair):
    if pair and method == "cholesky":
        pytest.skip("tied only")
    X, Y = (marks(2, 5, 8, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))

    def core(X, Y):
        return landmark_core(X, Y if pair else None, method=method, kind=kind, jitter=1e-2)

    assert torch.autograd.gradcheck(core, (X, Y) if pair else (X, X.detach()))


def test_gradients_do_not_unroll_a_solver():
    """The graph of a core has a fixed number of nodes, whatever the size."""

    def nodes(size):
        core = landmark_core(marks(1, size, 8).requires_grad_())
        seen, todo = set(), [core.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen)

    assert nodes(4) == nodes(64) < 40


def test_untied_landmarks_warn_once_and_name_the_condition_number(monkeypatch):
    monkeypatch.setattr(landmarks, "_warned", False)
    X, Y = marks(2, 16, 16), marks(2, 16, 16, seed=1)
    condition = float(torch.linalg.cond(attention(X, Y)).max())
    with pytest.warns(UserWarning, match=f"condition number {condition:.1e}".replace("+", r"\+")):
        landmark_core(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        landmark_core(X, Y)
        landmark_core(X)


def test_autocast_does_not_lower_the_precision_of_a_core():
    X = init_landmarks(2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        core = landmark_core(X)
    helpers.assert_identical(core, landmark_core(X))


def write_by_optimizer(X):
    """The fused step writes without a new version of the tensor."""
    X.grad = torch.ones_like(X)
    torch.optim.AdamW([X], lr=0.1, fused=True).step()
    X.grad = None


WRITES = {
    "fused-optimizer": write_by_optimizer,
    "data": lambda X: X.data.mul_(1.5),
    "numpy": lambda X: X.detach().numpy().__imul__(1.5),
    "storage": lambda X: X.untyped_storage().copy_((X.detach() * 1.5).untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_call_reads_the_landmarks_as_they_are(write):
    X = nn.Parameter(init_landmarks(2, 8, 16))
    tokens = [marks(1, 2, 12, 16, seed=s) for s in range(3)]
    with torch.no_grad():
        before = nystrom_attention(*tokens, X)
    WRITES[write](X)
    with torch.no_grad():
        after = nystrom_attention(*tokens, X)
        wanted = nystrom_attention(*tokens, X.detach().clone())
    assert not torch.allclose(after, before)
    helpers.assert_identical(after, wanted)


@pytest.mark.parametrize("path", ["native", "pytorch"])
@pytest.mark.parametrize("method", ["cholesky", "tikhonov"])
@pytest.mark.parametrize("kind", ["softmax", "kernel"])
def test_no_jitter_is_exact_or_an_error(monkeypatch, path, method, kind):
    if path == "pytorch":
        monkeypatch.setattr(native, "preferred", lambda device: False)
    X = init_landmarks(2, 8, 16, dtype=torch.float64)
    core = landmark_core(X, method=method, kind=kind, jitter=0)
    helpers.assert_close(core, landmark_core(X, method=method, kind=kind, jitter=1e-14), 1e-9)
    X[1] = X[1, :1]
    with pytest.raises(ValueError, match="jitter: expected a number > 0 for .* got 0"):
        landmark_core(X, method=method, kind=kind, jitter=0)


class Products(TorchDispatchMode):
    """Operators that compute, by name, and the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        free = "view _unsafe_view expand transpose detach t promote_types fill_"
        if name not in free.split():
            self.names.append(name)
        if name in ("mm", "bmm", "baddbmm"):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["native", "pytorch"])
@pytest.mark.parametrize("method", ["cholesky", "tikhonov", "newton_schulz"])
def test_on_a_gpu_no_product_depends_on_the_precision_of_float32(monkeypatch, path, method):
    """As on a GPU, whose setting may be tf32: all products are float64, the core is float32."""
    if path == "pytorch":
        monkeypatch.setattr(native, "preferred", lambda device: False)
    monkeypatch.setattr(landmarks, "_in_float64", lambda device, method: True)
    X = init_landmarks(2, 8, 16).bfloat16().requires_grad_()
    with Products() as products:
        core = landmark_core(X, method=method)
        core.square().sum().backward()
    assert core.dtype == torch.float32 and X.grad.dtype == torch.bfloat16
    in_one_operator = path == "native" and method == "cholesky" and native.available()
    assert products.dtypes == (set() if in_one_operator else {torch.float64})
    wanted = landmark_core(X.detach().double(), method=method)
    helpers.assert_close(core, wanted, 1e-6)


@pytest.mark.skipif(not native.available(), reason="the native operators are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_core_on_a_gpu_is_one_launch_each_way(dtype):
    """Counted where the C++ operators stand for the CUDA ones; half precision is cast each way."""
    X = init_landmarks(2, 8, 16).to(dtype).requires_grad_()
    with Products() as forward:
        core = landmark_core(X)
    with Products() as backward:
        torch.autograd.grad(core, X, torch.ones_like(core))
    cast = ["_to_copy"] if dtype == torch.bfloat16 else []
    assert forward.names == [*cast, "landmarks_core_saving"]
    assert [x for x in backward.names if x != "ones_like"] == ["landmarks_core_backward", *cast]
    with torch.no_grad(), Products() as alone:
        landmark_core(X)
    assert alone.names == [*cast, "landmarks_core"]


def test_cuda_tensors_take_the_cuda_operator_where_it_is_built(monkeypatch):
    for built in (True, False):
        monkeypatch.setattr(native, "has_cuda", lambda built=built: built)
        assert native.solves_cores(torch.device("cuda")) is built
    assert not native.solves_cores(torch.device("meta"))


@pytest.mark.parametrize("path", ["native", "pytorch"])
@pytest.mark.parametrize("kind", ["softmax", "kernel"])
@pytest.mark.parametrize("sizes", [(16, 1), (7, 2), (16, 16), (64, 32)], ids=str)
def test_a_gradient_changes_no_bit_of_the_core(monkeypatch, path, kind, sizes):
    """Landmarks that are nearly alike (16 of one dimension) have cores that rounding would move."""
    if path == "pytorch":
        monkeypatch.setattr(native, "preferred", lambda device: False)
    X = init_landmarks(2, *sizes, generator=torch.Generator().manual_seed(0))
    leaf, wide = X.clone().requires_grad_(), X.double().requires_grad_()
    core, wanted = landmark_core(leaf, kind=kind), landmark_core(wide, kind=kind)
    assert torch.equal(core, landmark_core(X, kind=kind))
    helpers.assert_close(core, wanted, 1e-6)
    helpers.assert_close(torch.vmap(lambda x: landmark_core(x, kind=kind))(X), wanted, 1e-6)
    dcore = helpers.randn(*core.shape)
    (dX,) = torch.autograd.grad(core, leaf, dcore)
    (dwide,) = torch.autograd.grad(wanted, wide, dcore.double())
    if kind == "softmax" or sizes[1] > 1:  # the gradient of one dimension's kernel core is rounding
        helpers.assert_close(dX, dwide, 1e-6)


@pytest.mark.parametrize("count", [1, 8, 16, 40])
def test_initial_landmarks_are_orthogonal_rows_of_norm_sqrt_d(count):
    X = init_landmarks(3, count, 16, generator=torch.Generator().manual_seed(0))
    assert X.shape == (3, count, 16)
    helpers.assert_close(X.norm(dim=-1), torch.full((3, count), 4.0), 1e-5)
    for start in range(0, count, 16):
        block = X[:, start : start + 16]
        helpers.assert_close(
            block @ block.mT / 16, torch.eye(block.shape[1]).expand(3, -1, -1), 1e-5
        )
    assert not torch.allclose(X[0], X[1])


def test_initial_landmarks_repeat_with_a_generator():
    one, two = (init_landmarks(2, 8, 16, generator=torch.Generator().manual_seed(7)) for _ in "ab")
    helpers.assert_identical(one, two)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(4, 4)
        self.landmarks = nn.Parameter(init_landmarks(1, 4, 4))
        self.others = mark_landmarks(nn.Parameter(init_landmarks(1, 4, 4)))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def test_parameter_groups_keep_landmarks_out_of_weight_decay():
    model = nn.Sequential(Model(), nn.Linear(4, 1))
    others, marked = landmark_parameter_groups(model, weight_decay=0.1)
    assert {id(p) for p in marked["params"]} == {id(model[0].landmarks), id(model[0].others)}
    assert (others["weight_decay"], marked["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 4
    before = model[0].landmarks.detach().clone()
    optimizer = torch.optim.AdamW([others, marked], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model[0].projection.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].landmarks, before)
    assert not torch.equal(model[0].projection.weight, weight)


def test_parameter_groups_of_a_copy_and_of_a_model_without_landmarks():
    _, marked = landmark_parameter_groups(copy.deepcopy(Model()), weight_decay=0.1)
    assert any(p.shape == (1, 4, 4) for p in marked["params"])
    (only,) = landmark_parameter_groups(nn.Linear(2, 2), weight_decay=0.1)
    assert only["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "method: expected 'tik", lambda X: landmark_core(X, -X, method="cholesky")),
        (ValueError, "method: expected None or one of", lambda X: landmark_core(X, method="qr")),
        (ValueError, "kind: expected", lambda X: landmark_core(X, kind="gauss")),
        (ValueError, "jitter: expected", lambda X: landmark_core(X, jitter=-1e-4)),
        (ValueError, "iterations: expected", lambda X: landmark_core(X, iterations=0)),
        (ValueError, "scale: expected", lambda X: landmark_core(X, scale=-1.0)),
        (ValueError, "landmark_keys: expected shape", lambda X: landmark_core(X, X[:, :2])),
        (ValueError, "landmark_queries: expected shape", lambda X: landmark_core(X[0, 0])),
        (TypeError, "landmark_queries: expected a tensor", lambda X: landmark_core([1.0])),
        (TypeError, "landmark_queries: expected a float", lambda X: landmark_core(X.int())),
        (ValueError, "landmarks: expected an int", lambda X: init_landmarks(1, 0, 4)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message) as raised:
        call(marks(1, 4, 8))
    assert "\n" not in str(raised.value)


def test_scale_defaults_to_the_attention_s():
    X = marks(1, 4, 16)
    helpers.assert_identical(landmark_core(X), landmark_core(X, scale=1 / math.sqrt(16)))


def test_landmarks_are_drawn_in_float32_whatever_the_default_dtype():
    wanted = init_landmarks(2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = init_landmarks(2, 5, 4, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    helpers.assert_identical(found, wanted)
