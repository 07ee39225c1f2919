"""Loads, stores and atomic operations on parameters, global and shared memory."""

from __future__ import annotations

import numpy as np

from .arithmetic import PARAM_WINDOW, SHARED_WINDOW
from .parser import SIZES, Name, Vector
from .registry import opcode, unknown

ATOMIC = -1
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


def _registers(operand) -> list:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


@opcode("ld")
def emit_ld(c, i):
    kind, space = i.type, _space(i)
    if set(i.parts[:-1]) - _IGNORED:
        raise unknown(i)
    to, address = _registers(i.operands[0]), i.operands[1]
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
        M.races.read(i, at, size * count, s, m)
    return gather(M.words[size], at, size, count)


def gather(words, at, size: int, count: int) -> list:
    index = at // size
    if count == 1:
        return [words[index]]
    rows = words[: len(words) // count * count].reshape(-1, count)[index // count]
    return [rows[..., n] for n in range(count)]


def load_global(M, i, address, size: int, count: int, s, m) -> list:  # noqa: N803
    from .machine import _FIRST, WHOLE

    region = M.check_global(i, address, size * count, s, m)
    if m is not None:
        some = np.broadcast_to(m, np.broadcast_shapes(m.shape, address.shape))
        if not some.any():
            return [np.zeros((1, 1), f"u{size}")] * count
        address = np.broadcast_to(address, some.shape)
        address = np.where(some, address, address[some].flat[0])
    if M.options.check_races:
        global_read(M, i, region, address, size * count, s, m)
    index = (address - _FIRST) // size
    return [WHOLE[size][index + n] if n else WHOLE[size][index] for n in range(count)]


def load_generic(M, i, address, size: int, count: int, s, m) -> list:  # noqa: N803
    first = _first(address, m)
    if first is None:
        return [np.zeros((1, 1), f"u{size}")] * count
    if first >= PARAM_WINDOW:
        index = (address - PARAM_WINDOW) // size
        return [M.params.view(f"u{size}")[index + n] for n in range(count)]
    if first >= SHARED_WINDOW:
        return load_shared(M, i, address - SHARED_WINDOW, size, count, s, m)
    return load_global(M, i, address, size, count, s, m)


def _first(address, m) -> int | None:
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
    address, values = i.operands[0], _registers(i.operands[1])
    size = SIZES[kind]
    names = [c.read(v, f"b{8 * size}") for v in values]
    store = {"shared": store_shared, "global": store_global, "generic": store_generic}[space]
    arguments = ("M", c.thing(i), c.address(address), size, f"[{', '.join(names)}]", "s", c.mask(i))
    c.do(c.call(store, *arguments))


def store_shared(M, i, address, size: int, values: list, s, m) -> None:  # noqa: N803
    at = M.shared_at(i, address, size * len(values), s, m)
    if M.options.check_races:

        def changes():
            return _changes(
                M.words[size], at // size, values, m, len(M.all_warps if s is None else s)
            )

        M.races.write(i, at, size * len(values), s, m, changes=changes)
    scatter(M, i, M.words[size], at // size, values, s, m, address)


def differ(a, b) -> np.ndarray:
    """Whether two words are of different values. Copies of one value that lanes compute alike may
    differ by a rounding, where the compiler fused a product with a sum of another lane's.
    """
    other = a != b
    if not other.any() or a.dtype.itemsize == 1:
        return other
    if a.dtype.itemsize == 2:  # one step, of what is no small integer
        step = np.abs(a.astype("i4") - b.astype("i4")) <= 1
        return other & ~(step & (np.minimum(a, b) >= 0x80))
    kind = f"f{a.dtype.itemsize}"
    x, y = np.broadcast_arrays(a, b)
    x, y = np.ascontiguousarray(x).view(kind), np.ascontiguousarray(y).view(kind)
    size = np.maximum(np.abs(x), np.abs(y))
    close = np.abs(x - y) <= np.maximum(size * 1e-3, 1e-5)
    return other & ~(close & (size >= np.finfo(kind).tiny))


def _changes(words, index, values: list, m, warps: int) -> np.ndarray:
    """Lanes, in the race checker's order, whose stores would change memory."""
    different = np.zeros(index.shape, bool)
    for n, value in enumerate(values):
        different = different | differ(words[index + n], value)
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
            lost = differ(words[index + n], value)
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
        lost = differ(words[index + n], value)
        if lost.any():
            bad = np.zeros(some.shape, bool)
            bad[some] = lost
            M.report_lanes(i, TWO_VALUES, bad, address, s)


def store_global(M, i, address, size: int, values: list, s, m) -> None:  # noqa: N803
    from .machine import _FIRST, WHOLE

    region = M.check_global(i, address, size * len(values), s, m)
    if M.options.check_races:
        global_write(M, i, region, address, size * len(values), s, m)
    scatter(M, i, WHOLE[size], (address - _FIRST) // size, values, s, m, address)


def store_generic(M, i, address, size: int, values: list, s, m) -> None:  # noqa: N803
    first = _first(address, m)
    if first is None:
        return
    if first >= SHARED_WINDOW:
        return store_shared(M, i, address - SHARED_WINDOW, size, values, s, m)
    store_global(M, i, address, size, values, s, m)


# races in global memory: between CTAs, and between warps of a CTA


def _cells(M, region, address, size: int, s, m):  # noqa: N803
    """(granules [n], warps [n] of the batch) of an access to one region."""
    granule = M.program.granule["global"]
    warps = M.all_warps if s is None else s
    shape = (len(warps), max(address.shape[1], 1 if m is None else m.shape[1]))
    address = np.broadcast_to(address, shape)
    warps = np.broadcast_to(warps[:, None], shape)
    if m is not None:
        some = np.broadcast_to(m, shape)
        address, warps = address[some], warps[some]
    cells = (address.ravel() - region.start) // granule
    warps = warps.ravel()
    count = max(1, size // granule)
    if count > 1:
        cells = (cells[:, None] + np.arange(count)).ravel()
        warps = np.repeat(warps, count)
    if region.writer is None:
        n = -(-(region.end - region.start) // granule) + 1
        region.writer, region.write = np.zeros(n, "i4"), np.zeros(n, "i8")
        region.reader, region.read = np.zeros(n, "i4"), np.zeros(n, "i8")
    return cells, warps


def global_read(M, i, region, address, size: int, s, m, atomic: bool = False) -> None:  # noqa: N803
    if region is None:
        return
    cells, warps = _cells(M, region, address, size, s, m)
    me = (warps + M.first_cta * M.warps_per_cta + 1).astype("i4")
    writer = region.writer[cells]
    other = (writer != me) & (writer != 0)
    if other.any():
        _compare(M, i, "read after write", other, cells, warps, region, writer, region.write)
    region.reader[cells] = me
    region.read[cells] = M.races.now << 16 | i.index


def global_write(M, i, region, address, size: int, s, m, atomic: bool = False) -> None:  # noqa: N803
    if region is None:
        return
    cells, warps = _cells(M, region, address, size, s, m)
    me = (warps + M.first_cta * M.warps_per_cta + 1).astype("i4")
    writer, reader = region.writer[cells], region.reader[cells]
    other = (writer != me) & (writer != 0)
    if atomic:
        other &= writer != ATOMIC
    if other.any():
        _compare(M, i, "write after write", other, cells, warps, region, writer, region.write)
    other = (reader != me) & (reader != 0)
    if other.any():
        _compare(M, i, "write after read", other, cells, warps, region, reader, region.read)
    region.writer[cells] = ATOMIC if atomic else me
    region.write[cells] = M.races.now << 16 | i.index


def _compare(M, i, kind: str, other, cells, warps, region, owner, stamps) -> None:  # noqa: N803
    """Accesses after those of other warps: in another CTA nothing orders them."""
    first = M.first_cta * M.warps_per_cta
    n = np.nonzero(other)[0]
    theirs = owner[n] - 1 - first
    near = (theirs >= 0) & (theirs < M.warps)
    safe = np.where(near, theirs, 0)
    near &= M.cta_of[safe] == M.cta_of[warps[n]]
    seen = M.races.seen[warps[n], M.races.own[safe]] >= stamps[cells[n]] >> 16
    fault = np.nonzero(~(near & seen))[0]
    if fault.size:
        at = n[fault[0]]
        stamp, who = int(stamps[cells[at]]), int(owner[at])
        by = (
            "an atomic operation"
            if who == ATOMIC
            else f"CTA {(who - 1) // M.warps_per_cta}, warp {(who - 1) % M.warps_per_cta}"
        )  # noqa: E501
        text = f"{by}, {M.program.instructions[stamp & 0xFFFF]}"
        address = region.start + int(cells[at]) * M.program.granule["global"]
        M.report(i, f"race in global memory: {kind}", int(warps[at]), 0, address, text)


# atomic operations


@opcode("atom", "red")
def emit_atom(c, i):
    """`red` gives no old value."""
    known = {"atom", "red", "global", "shared", "gpu", "cta", "sys", "relaxed", "acquire",
             "acq_rel", "release", "v2", "v4", "add", "min", "max", "cas", "exch", "and", "or", "xor", "noftz"}  # fmt: skip # noqa: E501
    if set(i.parts[:-1]) - known:
        raise unknown(i)
    kind = i.type
    has_result = i.base == "atom"
    address, *operands = i.operands[1:] if has_result else i.operands
    name = next(p for p in i.parts if p in _UPDATES)
    columns = [[c.read(x, kind) for x in _registers(o)] for o in operands]
    lists = ", ".join(f"[{', '.join(names)}]" for names in columns)
    shared = i.has("shared")
    at = c.address(address)
    call = c.call(atomic, "M", c.thing(i), repr(name), repr(shared), at, f"[{lists}]", "s",
                  c.mask(i))  # fmt: skip
    value = c.let(call)
    if has_result:
        for n, register in enumerate(_registers(i.operands[0])):
            bits = f"b{8 * SIZES[kind]}"
            c.write(register, bits, f"{value}[{n}].view('u{SIZES[kind]}')", i.guard)


def _compare_and_swap(old, expected, new):
    return new if old == expected else old


_UPDATES = {
    "add": lambda old, x: old + x, "min": min, "max": max, "exch": lambda old, x: x,
    "and": lambda old, x: old & x, "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x,
    "cas": _compare_and_swap,
}  # fmt: skip


def atomic(M, i, name: str, shared: bool, address, operands: list, s, m) -> list:  # noqa: N803
    """Lane by lane, in a drawn order. Returns old values."""
    from .machine import _FIRST, WHOLE

    count = len(operands[0])
    dtype = operands[0][0].dtype
    size = dtype.itemsize
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    address = np.broadcast_to(address, shape)
    first = _first(address, some)
    if first is None:
        return [np.zeros((1, 1), dtype)] * count
    if not shared and first >= SHARED_WINDOW:
        shared, address = True, address - SHARED_WINDOW
    if shared:
        at = M.shared_at(i, address, size * count, s, some)
        words, index = M.words[size].view(dtype), at // size
    else:
        region = M.check_global(i, address, size * count, s, some)
        if M.options.check_races:
            global_write(M, i, region, address, size * count, s, some, atomic=True)
        words, index = WHOLE[size].view(dtype), (address - _FIRST) // size
    old = [np.zeros(shape, dtype) for _ in range(count)]
    rows, lanes = np.nonzero(some)
    order = M.draw.permutation(len(rows))
    rows, lanes = rows[order], lanes[order]
    cells = index[rows, lanes]
    update = _UPDATES[name]
    if name == "add" and len(np.unique(cells)) == len(cells):
        for n in range(count):
            previous = words[cells + n]
            old[n][rows, lanes] = previous
            words[cells + n] = previous + np.broadcast_to(operands[0][n], shape)[rows, lanes]
        return old
    for n in range(count):
        values = [np.broadcast_to(o[n], shape)[rows, lanes] for o in operands]
        before = old[n]
        for k, cell in enumerate(cells + n):
            previous = words[cell]
            before[rows[k], lanes[k]] = previous
            words[cell] = update(previous, *(v[k] for v in values))
    return old


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
