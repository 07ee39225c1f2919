"""Helpers of the tests: poisoned inputs, error measures, masks written out by formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from flashmark import masks
from flashmark.dispatch import can_run_cpu

# Backends that every behavioural test of an operator runs on, on this machine.
BACKENDS = ["eager"] + ["cpu"] * can_run_cpu("block_sparse", torch.zeros(1))

PAD = 512  # poisoned elements on either side of an input


def poisoned(tensor: Tensor, *, layout: str = "contiguous") -> Tensor:
    """A copy of `tensor` in the middle of a buffer of NaN (largest integer for integer dtypes).

    A kernel that reads beside its input gets poison in its result. `layout`, with stride(-1) == 1
    always: "contiguous"; "bnhd" stores dims 1 and 2 transposed, as a projection leaves them; "gaps"
    leaves poison between rows.
    """
    dtype = tensor.dtype
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    stored = tensor.transpose(1, 2) if layout == "bnhd" else tensor
    width = tensor.shape[-1] + (5 if layout == "gaps" else 0)
    shape = (*stored.shape[:-1], width)
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * PAD,), poison, dtype=dtype, device=tensor.device)
    view = buffer[PAD : PAD + count].view(shape)[..., : tensor.shape[-1]]
    view = view.transpose(1, 2) if layout == "bnhd" else view
    return view.copy_(tensor.detach())


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False
) -> Tensor:
    """Normal numbers that depend on `seed` and `shape` only, inside a poisoned buffer."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return (poisoned(values) if values.dim() else values).requires_grad_(grad)


def qkv(
    batch: int = 1,
    heads: int = 2,
    q_len: int = 40,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    kv_len: int | None = None,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value as leaves inside poisoned buffers."""
    kv_heads, kv_len, v_dim = kv_heads or heads, kv_len or q_len, v_dim or dim
    shapes = (
        (batch, heads, q_len, dim),
        (batch, kv_heads, kv_len, dim),
        (batch, kv_heads, kv_len, v_dim),
    )
    tensors = (randn(*s, dtype=dtype, seed=3 * seed + n) for n, s in enumerate(shapes))
    return tuple(poisoned(t, layout=layout).requires_grad_(grad) for t in tensors)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; infinities must be equal, NaN is an error."""
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    infinite = expected.isinf()
    if (
        not torch.equal(actual[infinite], expected[infinite])
        or not actual[~infinite].isfinite().all()
    ):
        return float("inf")
    actual, expected = actual[~infinite], expected[~infinite]
    if expected.numel() == 0:
        return 0.0
    largest = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    return difference / largest if largest else difference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.1e}"


def assert_identical(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Assert equal bits; NaN is never accepted."""
    assert not actual.isnan().any(), f"{name}: has NaN"
    assert torch.equal(actual, expected), (
        f"{name}: differs, largest by {(actual - expected).abs().max()}"
    )


def outputs_and_grads(
    op: Callable, tensors: dict[str, Tensor], *, seed: int = 100, **options
) -> dict[str, Tensor]:
    """Run `op` with `return_lse=True`, then backpropagate random gradients of out and lse.

    Returns {"out", "lse", "d <name>"...}; tensors that do not require a gradient have no entry.
    """
    out, lse = op(**tensors, **options, return_lse=True)
    # few enough bits that every dtype holds the same numbers
    d_out, d_lse = (
        randn(*t.shape, dtype=torch.bfloat16, seed=seed + n).to(t.dtype)
        for n, t in enumerate((out, lse))
    )
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (d_out, d_lse), allow_unused=True
    )
    result = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad is not None, f"no gradient for {name}"
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype, f"gradient of {name}"
        result[f"d {name}"] = grad
    return result


def check_half_landmarks(
    attend: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The gradient of half-precision landmarks is that of their float32 copy, rounded once.

    The loss is scaled as for training in float16: gradients of the single uses are infinite there.
    """
    half = randn(*shape, dtype=dtype, seed=5, grad=True)
    wide = half.detach().float().requires_grad_()
    outs = [attend(x) for x in (half, wide)]
    assert_identical(*outs)
    found, wanted = (
        torch.autograd.grad((out.float() * 4096.0).sum(), x)[0]
        for out, x in zip(outs, (half, wide), strict=True)
    )
    assert wanted.isfinite().all() and wanted.any()
    assert_identical(found, wanted.to(dtype))


def upcast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float64, as fresh leaves."""
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


@dataclasses.dataclass(frozen=True)
class Rule:
    """A mask of the library beside the formula that it stands for.

    `sees(b, h, i, p, j)` takes broadcastable int64 indices: sample, head, query, position of the
    query among the keys (i + Nk - Nq), key.
    """

    name: str
    mask: masks.Mask
    sees: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __and__(self, other: Rule) -> Rule:
        return Rule(
            f"({self.name} & {other.name})",
            self.mask & other.mask,
            lambda *at: self.sees(*at) & other.sees(*at),
        )

    def __or__(self, other: Rule) -> Rule:
        return Rule(
            f"({self.name} | {other.name})",
            self.mask | other.mask,
            lambda *at: self.sees(*at) | other.sees(*at),
        )

    def __invert__(self) -> Rule:
        return Rule(f"~{self.name}", ~self.mask, lambda *at: ~self.sees(*at))

    def dense(self, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
        """Every element by the formula, bool (batch, heads, q_len, kv_len)."""
        b = torch.arange(batch).view(-1, 1, 1, 1)
        h = torch.arange(heads).view(-1, 1, 1)
        i = torch.arange(q_len).view(-1, 1)
        j = torch.arange(kv_len)
        visible = self.sees(b, h, i, i + kv_len - q_len, j)
        return visible.broadcast_to(batch, heads, q_len, kv_len)


def causal() -> Rule:
    return Rule("causal", masks.causal(), lambda b, h, i, p, j: j <= p)


def window(left: int, right: int | None = None) -> Rule:
    def sees(b, h, i, p, j):
        return (j > p - left) & (True if right is None else j <= p + right)

    return Rule(f"window({left},{right})", masks.sliding_window(left, right), sees)


def diagonal() -> Rule:
    return Rule("diagonal", masks.diagonal(), lambda b, h, i, p, j: j == p)


def dilated(stride: int) -> Rule:
    return Rule(
        f"dilated({stride})", masks.dilated(stride), lambda b, h, i, p, j: (p - j) % stride == 0
    )


def prefix(n: int | Tensor) -> Rule:
    text = n if isinstance(n, int) else n.tolist()
    return Rule(
        f"prefix({text})",
        masks.prefix(n),
        lambda b, h, i, p, j: j < (n if isinstance(n, int) else n[b]) + 0 * p,
    )


def pinned(n: int | Tensor) -> Rule:
    text = n if isinstance(n, int) else n.tolist()
    return Rule(
        f"pinned({text})",
        masks.pinned(n),
        lambda b, h, i, p, j: (j < (n if isinstance(n, int) else n[b])) | (j == p),
    )


def documents(ids: Tensor) -> Rule:
    table = ids if ids.dim() == 2 else ids[None]

    def sees(b, h, i, p, j):
        b = b % table.shape[0]
        of_query, of_key = table[b, p.clamp(min=0)], table[b, j]
        return (p >= 0) & (of_query >= 0) & (of_query == of_key)

    return Rule(f"documents({'x'.join(map(str, ids.shape))})", masks.documents(ids), sees)


def key_padding(lengths: Tensor) -> Rule:
    if lengths.dtype == torch.bool:
        return Rule(
            "key_padding(bool)",
            masks.key_padding(lengths),
            lambda b, h, i, p, j: lengths[b, j] | (p != p),
        )
    return Rule(
        f"key_padding({lengths.tolist()})",
        masks.key_padding(lengths),
        lambda b, h, i, p, j: j < lengths[b] + 0 * p,
    )


def blocks(tiles: Tensor, block_size: int | tuple[int, int]) -> Rule:
    size_q, size_kv = (block_size, block_size) if isinstance(block_size, int) else block_size
    table = tiles[(None,) * (4 - tiles.dim())]

    def sees(b, h, i, p, j):
        return table[b % table.shape[0], h % table.shape[1], i // size_q, j // size_kv]

    shape = "x".join(map(str, tiles.shape))
    return Rule(f"blocks({shape},{block_size})", masks.blocks(tiles, block_size), sees)


def dense(visible: Tensor) -> Rule:
    table = visible[(None,) * (4 - visible.dim())]

    def sees(b, h, i, p, j):
        return table[b % table.shape[0], h % table.shape[1], i, j]

    return Rule(f"dense({'x'.join(map(str, visible.shape))})", masks.dense(visible), sees)


def mask_mod(name: str, fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Rule:
    return Rule(f"mask_mod({name})", masks.mask_mod(fn), lambda b, h, i, p, j: fn(b, h, i, j))
