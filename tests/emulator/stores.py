"""Bulk copies of boxes out of shared memory, by tensor maps: they read it until their group is
waited for.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .addresses import FIRST, WHOLE
from .copies import ELEMENT_BYTES, SWIZZLES, box_addresses, box_places, read_map
from .global_races import global_write


@dataclasses.dataclass
class Store:
    """A box on its way into a tensor, of a group of the thread that started it."""

    instruction: object
    warp: int
    lane: int
    group: int
    addresses: np.ndarray  # of the elements that lie in the tensor
    places: np.ndarray  # of the same, bytes of the batch's shared memory
    size: int
    cells: np.ndarray
    landed: bool = False

    def land(self, M) -> None:  # noqa: N803
        data = M.words[self.size][self.places // self.size]
        WHOLE[self.size][(self.addresses - FIRST) // self.size] = data
        self.landed = True


class Stores:
    """Stores that nobody has waited for, and the number of groups that each thread committed."""

    def __init__(self, machine):
        self.committed = np.zeros((machine.warps, 32), int)
        self.under_way: list[Store] = []


def stores_of(M) -> Stores:  # noqa: N803
    if M.stores is None:
        M.stores = Stores(M)
    return M.stores


def emit_store(c, i) -> None:
    """The instructions cp.async.bulk.tensor, from shared memory, commit_group and wait_group."""
    if i.has("commit_group"):
        c.do(c.call(commit, "M", "s", c.mask(i)))
    elif i.has("wait_group"):
        c.do(c.call(wait, "M", i.operands[0].value, "s", c.mask(i)))
    else:
        target, source = i.operands
        coordinates = ", ".join(c.read(x, "s32") for x in target.coordinates)
        call = c.call(store_box, "M", c.thing(i), c.address(target), f"[{coordinates}]",
                      c.address(source), "s", c.mask(i))  # fmt: skip
        c.do(call)


def _threads(M, s, m):  # noqa: N803
    """(warps, lanes) that take part."""
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    rows, lanes = np.nonzero(some)
    return warps[rows], lanes, rows


def commit(M, s, m) -> None:  # noqa: N803
    warps, lanes, _ = _threads(M, s, m)
    stores_of(M).committed[warps, lanes] += 1


def wait(M, keep: int, s, m) -> None:  # noqa: N803
    """Threads wait until all but their newest `keep` groups have read shared memory."""
    stores, races = stores_of(M), M.races
    warps, lanes, _ = _threads(M, s, m)
    least = np.full((M.warps, 32), -1)
    least[warps, lanes] = stores.committed[warps, lanes] - keep
    races.tick()
    rest = []
    for store in stores.under_way:
        if store.group >= least[store.warp, store.lane]:
            rest.append(store)
            continue
        if not store.landed:
            store.land(M)
        if M.options.check_races:
            races.store_done(store.cells, store.warp)
    stores.under_way = rest


def store_box(M, i, tensor, coordinates: list, source, s, m) -> None:  # noqa: N803
    shape = (M.warps if s is None else len(s), 32)
    tensor, source, *coordinates = (
        np.broadcast_to(x, shape) for x in (tensor, source, *coordinates)
    )
    for warp, lane, row in zip(*_threads(M, s, m), strict=True):
        box = read_map(M, i, int(tensor[row, lane]), int(warp), int(lane))
        start = [int(x[row, lane]) for x in coordinates]
        _start(M, i, box, start, int(source[row, lane]), int(warp), int(lane))


def _start(M, i, box, start: list[int], place: int, warp: int, lane: int) -> None:  # noqa: N803
    size, width = ELEMENT_BYTES[int(box["element"])], SWIZZLES[int(box["swizzle"])]
    if place % 128 or (width and int(box["box"][0]) * size > width):
        M.report(i, "a box that its swizzle or its place does not allow", warp, lane, place)
    addresses, inside = box_addresses(box, start)
    places = box_places(box, place)
    if places.max() + size > M.shared_limit:
        M.report(i, "out of bounds: a box in shared memory", warp, lane, place)
    places = places + int(M.cta_of[warp]) * M.shared_bytes
    cells = np.zeros(0, int)
    if M.options.check_races:
        cells = M.races.cells_of(places, size)
        M.races.store_read(i, cells, warp)
    addresses, places = addresses[inside], places[inside]
    if len(addresses):
        low, high = int(addresses.min()), int(addresses.max())
        region = M.memory.find(low)
        if region is None or high + size > region.end:
            M.report(i, "out of bounds: a box of global memory", warp, lane, low)
        elif M.options.check_races:
            _note_write(M, i, region, addresses, size, warp)
    stores = stores_of(M)
    group = int(stores.committed[warp, lane])
    store = Store(i, warp, lane, group, addresses, places, size, cells)
    landing = M.options.landing
    if landing == "early" or (landing == "drawn" and M.draw.random() < 0.5):
        store.land(M)
    stores.under_way.append(store)


def _note_write(M, i, region, addresses, size: int, warp: int) -> None:  # noqa: N803
    """As if the warp's lanes wrote the elements, 32 at a time."""
    rows = -(-len(addresses) // 32)
    lanes = np.arange(rows * 32).reshape(rows, 32)
    mask = lanes < len(addresses)
    at = addresses[np.minimum(lanes, len(addresses) - 1)]
    global_write(M, i, region, at, size, np.full(rows, warp), mask)
