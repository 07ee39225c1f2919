"""Loads and stores of parameters, global and shared memory; fences."""

from __future__ import annotations

import numpy as np

from .addresses import FIRST, PARAM_WINDOW, SHARED_WINDOW, WHOLE
from .global_races import global_read, global_write
from .parser import SIZES, Name, Vector
from .registry import opcode, unknown

TWO_VALUES = "two lanes store different values to one address"
_IGNORED = {
    "ld", "st", "global", "shared", "shared__cta", "param", "nc", "ca", "cg", "cs", "cv",
    "wb", "wt", "volatile", "relaxed", "acquire", "release", "weak", "gpu", "sys",
    "cta", "v2", "v4", "v8",
    "L1__evict_last", "L1__evict_first", "L1__no_allocate", "L1__evict_normal",
    "L1__evict_unchanged", "L2__64B", "L2__128B", "L2__256B",
}  # fmt: skip


def _space(i) -> str:
    for name in ("shared", "shared::cta", "global", "param"):
        if i.has(name):
            return name.removesuffix("::cta")
    if i.has("local") or i.has("const"):
        raise unknown(i)
    return "generic"


def registers_of(operand) -> list:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


@opcode("ld")
def emit_ld(c, i):
    kind, space = i.type, _space(i)
    if set(i.parts[:-1]) - _IGNORED:
        raise unknown(i)
    to, address = registers_of(i.operands[0]), i.operands[1]
    size, dtype = SIZES[kind], f"u{SIZES[kind]}"
    if space == "param" and isinstance(address.base, Name):
        start = c.program.param_offsets[address.base.name] + address.offset
        for n, register in enumerate(to):
            at = start + n * size
            text = f"M.params[{at}:{at + size}].view('{dtype}').reshape(1, 1)"
            c.write(register, *_typed(kind, text), i.guard)
        return
    mask = c.mask(i)
    load = {"shared": load_shared, "global": load_global, "generic": load_generic}[
        "generic" if space == "param" else space
    ]
    call = c.call(load, "M", c.thing(i), c.address(address), size, len(to), "s", mask)
    value = c.let(call)
    for n, register in enumerate(to):
        c.write(register, *_typed(kind, f"{value}[{n}]"), i.guard)


def _typed(kind: str, text: str) -> tuple[str, str]:
    """A loaded value is of its bits; signed ones are extended by their sign."""
    if kind[0] == "s":
        return kind, f"{text}.view('i{SIZES[kind]}')"
    return f"b{8 * SIZES[kind]}", text


def load_shared(M, i, address, size: int, count: int, s, m) -> list:  # noqa: N803
    at = M.shared_at(i, address, size * count, s, m)
    if M.options.check_races:
        M.races.read(i, at, i.used or size * count, s, m)
    return gather(M.words[size], at, size, count)


def gather(words, at, size: int, count: int) -> list:
    index = at // size
    if count == 1:
        return [words[index]]
    rows = words[: len(words) // count * count].reshape(-1, count)[index // count]
    return [rows[..., n] for n in range(count)]


def load_global(M, i, address, size: int, count: int, s, m) -> list:  # noqa: N803
    region = M.check_global(i, address, size * count, s, m)
    if m is not None:
        some = np.broadcast_to(m, np.broadcast_shapes(m.shape, address.shape))
        if not some.any():
            return [np.zeros((1, 1), f"u{size}")] * count
        address = np.broadcast_to(address, some.shape)
        address = np.where(some, address, address[some].flat[0])
    if M.options.check_races:
        global_read(M, i, region, address, size * count, s, m)
    index = (address - FIRST) // size
    return [WHOLE[size][index + n] if n else WHOLE[size][index] for n in range(count)]


def load_generic(M, i, address, size: int, count: int, s, m) -> list:  # noqa: N803
    first = first_address(address, m)
    if first is None:
        return [np.zeros((1, 1), f"u{size}")] * count
    if first >= PARAM_WINDOW:
        index = (address - PARAM_WINDOW) // size
        return [M.params.view(f"u{size}")[index + n] for n in range(count)]
    if first >= SHARED_WINDOW:
        return load_shared(M, i, address - SHARED_WINDOW, size, count, s, m)
    return load_global(M, i, address, size, count, s, m)


def first_address(address, m) -> int | None:
    """The address of one lane that takes part; all are taken to be of its space."""
    if m is None:
        return int(address.flat[0])
    some = np.broadcast_to(m, np.broadcast_shapes(m.shape, address.shape))
    return int(np.broadcast_to(address, some.shape)[some][0]) if some.any() else None


@opcode("st")
def emit_st(c, i):
    kind, space = i.type, _space(i)
    if set(i.parts[:-1]) - _IGNORED:
        raise unknown(i)
    address, values = i.operands[0], registers_of(i.operands[1])
    size = SIZES[kind]
    names = [c.read(v, f"b{8 * size}") for v in values]
    store = {"shared": store_shared, "global": store_global, "generic": store_generic}[space]
    arguments = ("M", c.thing(i), c.address(address), size, f"[{', '.join(names)}]", "s", c.mask(i))
    c.do(c.call(store, *arguments))


def store_shared(M, i, address, size: int, values: list, s, m) -> None:  # noqa: N803
    at = M.shared_at(i, address, size * len(values), s, m)
    if M.options.check_races:

        def changes():
            warps = len(M.all_warps if s is None else s)
            return _changes(M, M.words[size], at // size, values, m, warps)

        M.races.write(i, at, size * len(values), s, m, changes=changes)
    scatter(M, i, M.words[size], at // size, values, s, m, address)


def differ(M, a, b) -> np.ndarray:  # noqa: N803
    """Whether two words are of different values. Copies of one value that lanes compute alike may
    differ by a rounding, where the compiler fused a product with a sum of another lane's, or in the
    sign of a zero, the larger of two: not for `Options.same_bits`.
    """
    other = a != b
    if M.options.same_bits or not other.any() or a.dtype.itemsize == 1:
        return other
    if a.dtype.itemsize == 2:  # one step, of what is no small integer
        step = np.abs(a.astype("i4") - b.astype("i4")) <= 1
        return other & ~(step & (np.minimum(a, b) >= 0x80))
    kind = f"f{a.dtype.itemsize}"
    x, y = np.broadcast_arrays(a, b)
    x, y = np.ascontiguousarray(x).view(kind), np.ascontiguousarray(y).view(kind)
    size = np.maximum(np.abs(x), np.abs(y))
    close = np.abs(x - y) <= np.maximum(size * 1e-3, 1e-5)
    return other & ~(close & (size >= np.finfo(kind).tiny)) & (size != 0)


def _changes(M, words, index, values: list, m, warps: int) -> np.ndarray:  # noqa: N803
    """Lanes, in the race checker's order, whose stores would change memory."""
    different = np.zeros(index.shape, bool)
    for n, value in enumerate(values):
        different = different | differ(M, words[index + n], value)
    if m is None:
        if different.shape[1] > index.shape[1]:
            different = different.any(1, keepdims=True)
        return np.broadcast_to(different, (warps, index.shape[1])).ravel()
    shape = (warps, max(index.shape[1], m.shape[1]))
    if different.shape[1] > shape[1]:
        different = different.any(1, keepdims=True)
    return np.broadcast_to(different, shape)[np.broadcast_to(m, shape)]


def scatter(M, i, words, index, values: list, s, m, address) -> None:  # noqa: N803
    """Write, and see that no other lane of the instruction wrote something else there."""
    shape = np.broadcast_shapes(index.shape, *(v.shape for v in values))
    if m is None:
        if index.shape != shape:
            index = np.broadcast_to(index, shape)
        for n, value in enumerate(values):
            words[index + n] = value
            lost = differ(M, words[index + n], value)
            if lost.any():
                M.report_lanes(i, TWO_VALUES, lost, address, s)
        return
    some = np.broadcast_to(m, np.broadcast_shapes(shape, m.shape))
    index = np.broadcast_to(index, some.shape)[some]
    if not index.size:
        return
    for n, value in enumerate(values):
        value = np.broadcast_to(value, some.shape)[some]
        words[index + n] = value
        lost = differ(M, words[index + n], value)
        if lost.any():
            bad = np.zeros(some.shape, bool)
            bad[some] = lost
            M.report_lanes(i, TWO_VALUES, bad, address, s)


def store_global(M, i, address, size: int, values: list, s, m) -> None:  # noqa: N803
    region = M.check_global(i, address, size * len(values), s, m)
    if M.options.check_races:
        global_write(M, i, region, address, size * len(values), s, m)
    scatter(M, i, WHOLE[size], (address - FIRST) // size, values, s, m, address)


def store_generic(M, i, address, size: int, values: list, s, m) -> None:  # noqa: N803
    first = first_address(address, m)
    if first is None:
        return
    if first >= SHARED_WINDOW:
        return store_shared(M, i, address - SHARED_WINDOW, size, values, s, m)
    store_global(M, i, address, size, values, s, m)


@opcode("fence", "membar")
def emit_fence(c, i):
    if i.has("proxy"):
        if i.has("async") or any(p.startswith("async") for p in i.parts):
            c.do(c.call(proxy_fence, "M", "s", c.mask(i)))
        elif not any(p.startswith("tensormap") for p in i.parts):
            raise unknown(i)


def proxy_fence(M, s, m) -> None:  # noqa: N803
    warps = M.all_warps if s is None else s
    if m is not None:
        warps = warps[np.broadcast_to(m, (len(warps), m.shape[1])).any(1)]
    if len(warps):
        M.races.proxy_fence(warps)


@opcode("prefetch", "discard", "griddepcontrol", "nanosleep")
def emit_nothing(c, i):
    """Hints."""
