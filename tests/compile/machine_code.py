"""Machine code of sm_80 to sm_90, as nvdisasm prints it: instructions, loops, and the faults of
matrix products that run asynchronously.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable

from bench.offline import listing

LEAST = 10  # instructions of a loop that counts
KEPT = 5  # groups of wgmma that are followed; older ones are taken to be done

# operations whose first operand, where it is a register, is no result
WITHOUT_RESULT = re.compile(
    r"ST|RED|BAR|BR|EXIT|WARP|DEPBAR|LDGDEPBAR|LDGSTS|MEMBAR|FENCE|ERRBAR|CCTL|NOP|BSSY|BSYNC|BMOV|"
    r"UTMA|UBLKCP|SYNCS|[FDIH]SETP|PLOP3|R2UR|R2P|R2B|VOTEU|ELECT|CALL|RET|JMP|YIELD|NANOSLEEP|BPT|"
    r"KILL|HGMMA|U(?!NKNOWN)"
)
REGISTER = re.compile(r"(?<![A-Z])R(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of code."""

    address: int
    text: str

    @functools.cached_property
    def predicated(self) -> bool:
        return self.text.startswith("@")

    @functools.cached_property
    def operation(self) -> str:
        """With its suffixes, as "LDG.E.128"."""
        return self._bare.partition(" ")[0]

    @functools.cached_property
    def name(self) -> str:
        return self.operation.partition(".")[0]

    @functools.cached_property
    def operands(self) -> str:
        return self._bare.partition(" ")[2]

    @functools.cached_property
    def _bare(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text)


@dataclasses.dataclass(frozen=True)
class Product:
    """Registers of one HGMMA."""

    accumulator: frozenset[int]
    left: frozenset[int]  # empty where the left operand lies in shared memory
    ends_group: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Registers of products that were committed together and are not waited for."""

    accumulators: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()

    def __or__(self, other: Group) -> Group:
        return Group(self.accumulators | other.accumulators, self.left | other.left)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of one turn of a loop."""

    body: list[Instruction]

    @property
    def products(self) -> int:
        """Matrix products among them."""
        return sum(x.name in ("HGMMA", "HMMA", "IMMA") for x in self.body)


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel: its instructions, and the index of the one at each label."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, prefix: str) -> int:
        """Instructions whose operation begins so."""
        return sum(x.operation.startswith(prefix) for x in self.instructions)

    def target(self, x: Instruction) -> int | None:
        """Target of a branch, None where it is no branch to a label."""
        label = re.search(r"\.L_\w+", x.operands) if x.name == "BRA" else None
        return self.labels.get(label[0]) if label else None

    def loops(self) -> list[list[Instruction]]:
        """Bodies of the loops, in the order of their last instructions."""
        bodies = []
        for i, x in enumerate(self.instructions):
            first = self.target(x)
            if first is not None and first + LEAST <= i:
                bodies.append(self.instructions[first : i + 1])
        return bodies

    def product_loops(self) -> list[Loop]:
        """The innermost loops with matrix products, in the order of the code."""
        spans = [
            (first, i)
            for i, x in enumerate(self.instructions)
            if (first := self.target(x)) is not None and first + LEAST <= i
        ]
        inner = [
            a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] for b in spans if a != b)
        ]
        loops = [self._loop(first, last) for first, last in inner]
        return [loop for loop in loops if loop.products]

    def around(self, inner: Loop) -> Loop | None:
        """The loop right around another, if there is one."""
        start, end = inner.body[0].address, inner.body[-1].address
        wider = [
            (i - first, first, i)
            for i, x in enumerate(self.instructions)
            if (first := self.target(x)) is not None
            and self.instructions[first].address <= start
            and x.address > end
        ]
        return self._loop(*min(wider)[1:]) if wider else None

    def _loop(self, first: int, last: int) -> Loop:
        """The loop of these instructions. A long stretch that a branch may jump over is rare: it is
        left out, unless it has all products of the loop.
        """
        body, i = [], first
        while i <= last:
            x = self.instructions[i]
            body.append(x)
            to = self.target(x)
            jumps = to is not None and x.predicated and i + LEAST < to <= last
            if jumps:
                rest = Loop(self.instructions[i:last]).products
                jumps = not rest or Loop(self.instructions[i:to]).products < rest
            i = to if jumps else i + 1
        return Loop(body)

    def successors(self) -> list[list[int]]:
        """Indices of the instructions that may follow each."""
        after = []
        for i, x in enumerate(self.instructions):
            nexts = [i + 1] if i + 1 < len(self.instructions) else []
            guarded = x.predicated or re.match(r"!?U?P\d", x.operands)
            if x.name in ("BRA", "EXIT") and not guarded:
                nexts = []
            to = self.target(x)
            after.append(nexts if to is None else [*nexts, to])
        return after


@functools.lru_cache(maxsize=8)
def disassemble(cubin: bytes) -> Code:
    """The code of a kernel."""
    return parse(listing(cubin))


def parse(listing: str) -> Code:
    """Code read from the output of `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            instructions.append(Instruction(int(code[1], 16), code[2]))
    return Code(instructions, labels)


def serialised(code: Code) -> bool:
    """Whether ptxas gave up running products of wgmma side by side (its message C7515): then each
    has an arrival, and a wait, of its own.
    """
    products = sum(x.name == "HGMMA" and bool(product(x).accumulator) for x in code.instructions)
    return products > 1 and code.count("WARPGROUP.ARRIVE") >= products


def product(x: Instruction) -> Product:
    """Registers of an HGMMA. One that writes RZ computes nothing: it closes a group."""
    n, kind = re.match(r"HGMMA\.\d+x(\d+)x\d+\.(\w+)", x.operation).groups()
    accumulator, _, rest = x.operands.partition(",")
    first = REGISTER.search(accumulator)
    width = int(n) // (2 if kind == "F32" else 4)
    own = range(int(first[1]), int(first[1]) + width) if first else ()
    left = REGISTER.match(rest.strip())
    held = range(int(left[1]), int(left[1]) + 4) if left else ()
    return Product(frozenset(own), frozenset(held), "gsb" in rest)


def written(x: Instruction) -> frozenset[int]:
    """General registers that an instruction writes; not the accumulators of an HGMMA."""
    if WITHOUT_RESULT.match(x.name):
        return frozenset()
    first = None
    for operand in x.operands.split(","):
        if found := re.fullmatch(r"R(\d+)(\.\w+)*", operand.strip()):
            first = int(found[1])
            break
        if not re.fullmatch(r"!?U?P(T|\d+)", operand.strip()):  # results are predicates and this
            return frozenset()
    return frozenset() if first is None else frozenset(range(first, first + _width(x)))


def _width(x: Instruction) -> int:
    """Registers of a result."""
    operation, name = x.operation, x.name
    if name == "LDSM":
        return 4 if operation.endswith(".4") else 2 if operation.endswith(".2") else 1
    if name.startswith(("LD", "ATOM")):
        return 4 if ".128" in operation else 2 if ".64" in operation else 1
    if name in ("HMMA", "IMMA"):
        return 4 if "F32" in operation or name == "IMMA" else 2
    if name == "CS2R":
        return 1 if ".32" in operation else 2
    double = name in ("DADD", "DMUL", "DFMA", "DMNMX") or re.match(r"(F2F|I2F)\.F64", operation)
    return 2 if double or "WIDE" in operation else 1


def read(x: Instruction) -> frozenset[int]:
    """General registers that an instruction reads; of an HGMMA its left operand."""
    if x.name == "HGMMA":
        return product(x).left
    numbers = [int(n) for n in REGISTER.findall(x.operands)]
    pairs = {int(n) + 1 for n in re.findall(r"(?<![A-Z])R(\d+)\.64", x.operands)}
    if x.name.startswith(("ST", "RED")):
        n = 4 if re.search(r"\.128|STSM.*\.4", x.operation) else 2 if ".64" in x.operation else 1
        stored = REGISTER.findall(x.operands.rpartition("]")[2])
        pairs |= {int(stored[-1]) + k for k in range(n)} if stored else set()
        return frozenset(numbers) | pairs
    if x.name == "HMMA":
        widths = zip(numbers[1:4], (4, 2, 4), strict=False)
        return frozenset(first + k for first, n in widths for k in range(n))
    result = written(x) and REGISTER.search(x.operands.partition(",")[0])
    return frozenset(numbers[1 if result else 0 :]) | pairs


def hazards(code: Code) -> list[str]:
    """Registers of a wgmma in flight that something touches before the wait, over all paths: its
    accumulator may be neither read nor written, its left operand not written.
    """
    instructions, nexts = code.instructions, code.successors()
    found: dict[tuple[int, str], frozenset[int]] = {}
    states: list[tuple[Group, ...] | None] = [None] * len(instructions)
    states[0], work = (Group(),), [0]
    while work:
        i = work.pop()
        before = states[i]
        assert before is not None

        def report(what: str, registers: frozenset[int], i: int = i) -> None:
            if registers:
                found[i, what] = registers

        after = _step(instructions[i], before, report)
        for j in nexts[i]:
            merged = _merge(states[j], after)
            if merged != states[j]:
                states[j] = merged
                work.append(j)
    return [
        f"{instructions[i].address:x} {what} {sorted(registers)[:6]}: {instructions[i].text}"
        for (i, what), registers in sorted(found.items())
    ]


def _merge(one: tuple[Group, ...] | None, two: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups in flight on either of two paths that meet; the newest groups lie last."""
    if one is None:
        return two
    size = max(len(one), len(two))
    one = (Group(),) * (size - len(one)) + one
    two = (Group(),) * (size - len(two)) + two
    return tuple(a | b for a, b in zip(one, two, strict=True))


def _step(
    x: Instruction, state: tuple[Group, ...], report: Callable[[str, frozenset[int]], None]
) -> tuple[Group, ...]:
    """The groups in flight after an instruction, the one that is still open last."""
    flying = Group()
    for group in state:
        flying |= group
    if x.name == "HGMMA":
        new = product(x)
        report("takes as its left operand an accumulator in flight", new.left & flying.accumulators)
        state = (*state[:-1], state[-1] | Group(new.accumulator, new.left))
        return (*state, Group())[-KEPT:] if new.ends_group else state
    if x.operation.startswith("WARPGROUP.DEPBAR"):
        keep = int(re.search(r"gsb0,\s*(0x[0-9a-f]+|\d+)", x.operands)[1], 0)
        closed = state[:-1]
        return (*closed[max(0, len(closed) - keep) if keep else len(closed) :], state[-1])
    if flying != Group():
        new, old = written(x), read(x)
        report("writes the left operand of a wgmma in flight", new & flying.left)
        report("writes an accumulator in flight", new & flying.accumulators)
        report("reads an accumulator in flight", (old - new) & flying.accumulators)
    return state


def beyond_grants(code: Code) -> list[str]:
    """Registers beyond what the last setmaxnreg left to a warp, from each to the next."""
    marks = [i for i, x in enumerate(code.instructions) if x.name == "USETMAXREG"]
    over = []
    for i, end in itertools.pairwise([*marks, len(code.instructions)]):
        granted = int(code.instructions[i].operands.split()[-1].rstrip(","), 0)
        part = code.instructions[i:end]
        highest = max((int(n) for x in part for n in REGISTER.findall(x.operands)), default=0)
        if highest >= granted:
            over.append(f"{code.instructions[i].text}: R{highest} is used")
    return over
