"""A time predicted from counts, for each kernel pass and config: the order of trying, no result.

A program repeats one step, a tile of keys or a chunk of tokens. Each unit of a multiprocessor
needs so many cycles for it: matrix units, exponentials, float32 arithmetic, shared memory, and its
share of the L2 cache. Alone on a multiprocessor, a program uses one after the other; k programs in
flight hide all but the busiest unit from one another:

    cycles of a step = busiest + (sum + waits - busiest) / k

The time is the steps of a multiprocessor times that, or that of the longest program, or the bytes
of device memory at the speed of a copy, whichever is most. The rates of matrix products and copies
were measured on an H200; what is marked "assumed" is to be refitted to the first measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from bench.candidates import Case, Config
from bench.targets import COPY, MATRIX
from flashmark.kernels.nystrom import configs
from flashmark.kernels.nystrom.configs import BACKWARD_SPAN, FORWARD_SPAN

PROCESSORS = 132
CLOCK = 1.7e9  # assumed: under load, below the 1.98 GHz that the card may reach
EXPONENTIALS, ARITHMETIC, SHARED = 16, 128, 128  # a cycle and multiprocessor: two counts, bytes
L2 = 5.5e12  # bytes a second, assumed: what others report for an H100
ATOMICS = 2.5e12  # bytes a second of float32 sums in the L2 cache, assumed
PRODUCT_WAIT, LOAD_WAIT = 100, 700  # cycles until a product's, a load's result is there, assumed
PROGRAM = 2000  # cycles to begin and end a program, assumed
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65536, 233472, 64, 32  # of a multiprocessor
N, LANDMARK_N = 16384, 65536  # tokens of the works that are predicted, and of those timed
WINDOW, KEPT = 512, 0.25  # masks: a window in blocks of 128, random tiles in blocks of 64
CACHE, CACHE_GROUP = 65536, 8  # of decoding


@dataclasses.dataclass(frozen=True)
class Product:
    """[m, k] times [k, n]; `shared` says that the first operand is in shared memory too."""

    m: int
    n: int
    k: int
    shared: bool = False
    rate: float = 1.0

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def cycles(self) -> float:
        """Of the matrix units. Fewer than 64 rows go without the warp group's instruction."""
        slower = 2.0 if self.m < 64 else 1.0
        return slower * self.flops / self.rate / (MATRIX / PROCESSORS / CLOCK)

    def bytes_of_shared(self, warps: int) -> float:
        """Each 64 rows read the second operand; warp groups beside each other read the first."""
        rows = max(1, self.m // 64)
        beside = max(1, warps // 4 // rows)
        return 2 * (rows * self.k * self.n + beside * self.shared * self.m * self.k)


@dataclasses.dataclass(frozen=True)
class Step:
    """One turn of a program's loop."""

    products: tuple[Product, ...]
    exponentials: float
    arithmetic: float  # float32 operations, exponentials not among them
    loaded: float  # bytes from the L2 cache to shared memory
    chain: int  # products that wait for one another
    atomics: float = 0.0  # bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """A whole launch: its steps, programs, the steps of the longest program, device memory."""

    step: Step
    steps: float
    programs: float
    longest: float
    memory: float  # bytes


@dataclasses.dataclass(frozen=True)
class Prediction:
    ms: float
    parts: dict[str, float]  # ms of each unit, were it alone

    @property
    def binds(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


def programs_of_a_processor(registers: int, threads: int, shared: int) -> int:
    """How many programs fit a multiprocessor of compute capability 9.0; 0 where none does.

    Registers go to a warp in units of 256, from the quarter of the file that the warp belongs to.
    """
    warps = threads // 32
    warp_registers = math.ceil(registers * 32 / 256) * 256
    resident = 4 * (REGISTERS // 4 // warp_registers)
    return min(resident // warps, SHARED_BYTES // (shared + 1024), WARPS // warps, PROGRAMS)


def flops(case: Case) -> float:
    """What the mathematics needs: two to a multiply-add, only elements that the mask keeps."""
    if case.family == "nystrom":
        return sum(x.flops for work in _landmark_works(case, case.shipped()) for x in _all(work))
    products = {"backward_q": 3, "backward_kv": 4, "backward_grouped": 4, "backward_fused": 5}
    return 2 * products.get(case.pass_, 2) * heads(case) * kept(case) * case.dim


def heads(case: Case) -> int:
    return 16 if case.family == "nystrom" else 2048 // case.dim


def kept(case: Case) -> float:
    """Elements of a head's scores that its mask keeps."""
    if case.block == 128:
        return N * WINDOW - WINDOW * (WINDOW - 1) / 2
    return N * (N + 1) / 2 * (KEPT if case.block else 1.0)


def predict(case: Case, config: Config, programs: int, spilled: int = 0) -> Prediction:
    """The time of a pass, for a config of which `programs` fit a multiprocessor."""
    if case.pass_ == "decode":
        return _predict_decode(case, config, programs)
    nystrom = case.family == "nystrom"
    works = _landmark_works(case, config) if nystrom else [_sparse_work(case, config)]
    times = [_time(work, config, programs, spilled) for work in works]
    parts = {name: sum(time.parts[name] for time in times) for name in times[0].parts}
    return Prediction(sum(time.ms for time in times), parts)


def _time(work: Work, config: Config, programs: int, spilled: int) -> Prediction:
    step, warps = work.step, config.num_warps
    spill = 2 * spilled * 32 * warps  # written and read once a step
    shared = sum(x.bytes_of_shared(warps) for x in step.products) + step.loaded + spill
    units = {
        "products": sum(x.cycles() for x in step.products),
        "exponentials": step.exponentials / EXPONENTIALS,
        "arithmetic": (step.arithmetic + step.exponentials) / ARITHMETIC,
        "shared memory": shared / SHARED,
        "L2": step.loaded / (L2 / PROCESSORS / CLOCK),
        "atomics": step.atomics / (ATOMICS / PROCESSORS / CLOCK),
    }
    softmax = max(units["exponentials"], units["arithmetic"])
    alone = max(units["products"], units["shared memory"]) + softmax
    alone += step.chain * PRODUCT_WAIT
    alone += max(0.0, LOAD_WAIT - (config.num_stages - 1) * alone)
    busiest = max(units.values())
    in_flight = max(1, programs)
    if getattr(config, "form", "pointers") != "pointers" and config.num_warps == 4:
        in_flight *= 2  # warp groups that wait for no other, or scores beside a softmax
    cycles = busiest + max(0.0, alone - busiest) / in_flight
    share = PROCESSORS * CLOCK
    total = (work.steps * cycles + work.programs * PROGRAM / in_flight) / share
    longest = (work.longest * max(cycles, alone) + PROGRAM) / CLOCK
    seconds = {name: work.steps * x / share for name, x in units.items()}
    seconds["memory"] = work.memory / COPY
    parts = {name: 1e3 * x for name, x in seconds.items()}
    return Prediction(1e3 * max(total, longest, seconds["memory"]), parts)


def _sparse_work(case: Case, config: Config) -> Work:
    m, n, d = config.block_m, config.block_n, case.dim
    by_keys = case.pass_ in ("backward_kv", "backward_grouped", "backward_fused")
    held, walked = (n, m) if by_keys else (m, n)
    rows = N // held
    if case.block == 128:
        steps, longest = rows * (WINDOW + 128) / walked, (WINDOW + 128) / walked
    else:
        spans = [math.ceil((i + 1) * held / walked) for i in range(rows)]
        part = KEPT if case.block else 1.0
        steps, longest = part * sum(spans), part * spans[-1]
    size, pairs = m * n, heads(case)
    products, arithmetic, chain = _sparse_products(case.pass_, m, n, d)
    atomics = 4 * m * d if case.pass_ == "backward_fused" else 0
    if case.pass_ == "backward_grouped":
        longest *= 2
    step = Step(
        products,
        exponentials=size,
        arithmetic=size * (arithmetic + 6 * case.extras)
        + (m * d if case.pass_ == "forward" else 0),
        loaded=4 * walked * d,
        chain=chain,
        atomics=atomics,
    )
    tensors = {"forward": 4, "backward_q": 5, "backward_fused": 8}.get(case.pass_, 6)
    memory = pairs * N * d * 2 * tensors
    programs = pairs * rows / (2 if case.pass_ == "backward_grouped" else 1)
    return Work(step, pairs * steps, programs, longest, memory)


def _sparse_products(pass_: str, m: int, n: int, d: int) -> tuple[tuple[Product, ...], int, int]:
    """(products of a tile, float32 operations to an element, products in a row)."""
    if pass_ == "forward":  # S = Q K^T, O += P V
        return (Product(m, n, d, True), Product(m, d, n)), 4, 2
    if pass_ == "backward_q":  # S, dP = dO V^T, dQ += dS K
        return (Product(m, n, d, True), Product(m, n, d, True), Product(m, d, n)), 5, 2
    held = (Product(n, m, d, True), Product(n, m, d, True), Product(n, d, m), Product(n, d, m))
    if pass_ == "backward_fused":  # dQ^T = K^T dS^T, whose second operand is written first
        return (*held, Product(d, m, n, True)), 6, 3
    return held, 5, 2


def _landmark_works(case: Case, config: Config) -> list[Work]:
    """The launches of a pass: programs walk a slot's tokens in chunks. Memory is bytes a token."""
    m, d, c = case.marks, case.dim, config.chunk
    v = config.block_v
    parts = max(1, d // v)
    scores, sums = Product(m, c, d, True), Product(m, c, c, True)
    update = Product(m, v, c)
    grid = heads(case) * LANDMARK_N
    state = 4 * m * (d + 2)

    def launch(products, exps, operations, chain, memory, span, columns, walks=1.0):
        loaded = 2 * c * (2 * d + 2 * v) / (2 if case.pass_ in ("states", "read") else 1)
        step = Step(tuple(products), exps * m * c, operations * m * c + m * v, loaded, chain)
        steps, programs = grid / c * columns * walks, grid / span * columns
        return Work(step, steps, programs, walks * span / c, grid * memory * columns)

    if case.pass_ == "states":
        memory = 4 * d + state / FORWARD_SPAN
        return [launch((scores, update), 1, 6, 2, memory / parts, FORWARD_SPAN, parts)]
    if case.pass_ in ("forward", "read"):
        weights = Product(c, m, m, True, rate=0.5 if m <= 64 else 1.0)
        reading = [Product(c, m, d, True), weights, Product(c, v, m)]
        if case.pass_ == "read":
            return [launch(reading, 1, 6, 3, 4 * d / parts, BACKWARD_SPAN, parts)]
        between = [Product(c, c, m), Product(c, v, c)]
        products = [scores, sums, update, *reading, *between]
        memory = 8 * d + state / FORWARD_SPAN
        return [launch(products, 2, 14, 6, memory / parts, FORWARD_SPAN, parts)]
    return _landmark_backward(case, config, launch)


def _landmark_backward(case: Case, config: Config, launch: Callable[..., Work]) -> list[Work]:
    """All launches of a side, again for every block of columns of the values."""
    m, d, c, v, columns = case.marks, case.dim, config.chunk, config.block_v, config.block_d
    scores, sums = Product(m, c, d, True), Product(m, c, c, True)
    update, core = Product(m, v, c), Product(m, c, m, True, rate=1 / 3)
    dweights = [Product(m, c, v, True), Product(c, c, v, True), Product(m, c, c)]
    own = [Product(columns, c, m, True), Product(m, columns, c)]  # dQ or dK, and of landmarks
    works = []
    for _, takes in configs.launches(case.pass_, config.shares):
        has = {name for name, on in takes.items() if on is True}
        products, chain, blocks, walks = [scores, sums, scores, core, update], 6, 1, 1.0
        memory = 4 * d + 4 * v + 16 * m * (v + 2) / BACKWARD_SPAN
        if case.pass_ == "rows":
            products += dweights
            products += [update] * ("TAKES_STATES" in has)
            products += [Product(m, m, c)] * ("TAKES_CORE" in has)
            if "TAKES_QUERIES" in has:
                products += [core, *own]
                chain, blocks, memory = 8, d // columns, memory + 2 * d
        else:
            walks, memory = 1.5, memory + 2 * d + 2 * v  # first forward through the slot
            if "TAKES_KEYS" in has:
                products += [*dweights, Product(m, c, v), Product(m, c, c), sums, *own]
                chain, blocks, memory = 8, d // columns, memory + 2 * d + m * v / 4
            if "TAKES_VALUES" in has:
                products += [Product(c, v, m), Product(c, c, m), Product(c, v, c)]
                memory += 2 * v
        blocks, span = max(1, blocks), BACKWARD_SPAN  # blocks of one slot share its bytes
        works.append(launch(products, 2, 18, chain, memory / blocks, span, blocks * d // v, walks))
    return works


def _all(work: Work) -> list[Product]:
    """All products of a launch, as one."""
    return [dataclasses.replace(x, m=x.m * math.ceil(work.steps)) for x in work.step.products]


def _predict_decode(case: Case, config: Config, programs: int) -> Prediction:
    """Device memory, as far as the loads in flight keep it busy."""
    if case.family == "nystrom":  # a token a program: landmarks, core and state, once each
        m, d = case.marks, case.dim
        memory = heads(case) * (8 * m * d + 4 * m * m + 8 * m * (d + 1) + 8 * d)
        cycles = PROGRAM + 6 * PRODUCT_WAIT + 2 * LOAD_WAIT
        wide = max(1, d // config.block_v)
        return Prediction(
            1e3 * max(cycles / CLOCK, memory * wide / COPY), {"memory": memory / COPY}
        )
    batch, kv_heads = 8, 4
    memory = batch * kv_heads * CACHE * 4 * case.dim
    ahead = max(1, config.num_stages - 1) * config.block_n * 4 * case.dim
    resident = min(2, programs)  # the launcher fills the device twice
    fed = PROCESSORS * resident * ahead / (LOAD_WAIT / CLOCK)
    rate = min(COPY, fed)
    return Prediction(1e3 * memory / rate, {"memory": 1e3 * memory / COPY})
