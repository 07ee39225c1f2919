"""A kernel as Python: every basic block of PTX becomes one function over NumPy arrays.

A register is an array [1, 1], [warps, 1] or [warps, 32]: what is uniform stays small, as NumPy
broadcasts. A block reads its registers for the warps and lanes that run it, computes, and writes
back those that are read later.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from . import (  # noqa: F401
    arithmetic,
    atomics,
    barriers,
    bits,
    conversions,
    copies,
    lanes,
    matrix,
    mbarriers,
    memory,
    moves,
    warpgroup,
)  # fmt: skip
from .parser import SIZES, Address, Immediate, Instruction, Kernel, Name, Pair, Register, Vector
from .registry import OPCODES, unknown

NUMPY = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2",
    "f16": "f2", "bf16": "u2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "tf32": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "f16x2": "u4", "bf16x2": "u4",
    "s16x2": "u4", "u16x2": "u4",
}  # fmt: skip
JUMPS = ("bra", "brx", "ret", "exit")
ENDS = (*JUMPS, "bar", "barrier")


def ends_block(i: Instruction) -> bool:
    return i.base in JUMPS or (i.base in ("bar", "barrier") and not i.has("warp"))


def waits(i: Instruction) -> bool:
    return i.base == "mbarrier" and (i.has("try_wait") or i.has("test_wait"))


@dataclasses.dataclass
class Block:
    """Instructions [start, end). `kind`: "jump", "branch", "exit", "barrier", "wait", "table"."""

    index: int
    start: int
    end: int
    kind: str
    targets: list[int]  # of a branch: taken, else; of an exit under a guard: else
    function: object = None
    source: str = ""
    touches: object = None  # what it does to registers of matrix products, see warpgroup.py


class Program:
    """A kernel, its blocks, and its registers by number."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.instructions = kernel.instructions
        self.numbers = {name: n for n, name in enumerate(kernel.registers)}
        self.sizes = [NUMPY[kind] for kind in kernel.registers.values()]
        self.shared, self.static_shared = _layout(kernel.shared)
        self.param_offsets, self.param_bytes = _layout(kernel.params)
        self.granule = {space: _granule(self.instructions, space) for space in ("shared", "global")}
        self.blocks = self._split()
        self.live = self._liveness()

    def _split(self) -> list[Block]:
        code, labels = self.instructions, self.kernel.labels
        starts = {0, *labels.values()}
        for i in code:
            if ends_block(i):
                starts.add(i.index + 1)
            if waits(i):
                starts |= {i.index, i.index + 1}
        bounds = sorted(x for x in starts if x < len(code))
        at = {start: n for n, start in enumerate(bounds)}
        end = len(bounds)  # falling off the end
        blocks = []
        for n, start in enumerate(bounds):
            stop = bounds[n + 1] if n + 1 < len(bounds) else len(code)
            last = code[stop - 1]
            after = at.get(stop, end)
            where = lambda name: at.get(labels[name], end)  # noqa: E731
            if last.base == "bra":
                target = where(last.operands[0].name)
                kind, targets = ("branch", [target, after]) if last.guard else ("jump", [target])
            elif last.base == "brx":
                kind = "table"
                targets = [where(x) for x in self.kernel.tables[last.operands[1].name]]
            elif last.base in ("ret", "exit"):
                kind, targets = "exit", [after] if last.guard else []
            elif ends_block(last):
                kind, targets = "barrier", [after]
            elif waits(last):
                kind, targets = "wait", [after]
            else:
                kind, targets = "jump", [after]
            blocks.append(Block(n, start, stop, kind, targets))
        return blocks

    def _liveness(self) -> list[set[str]]:
        """Registers that are read after each block."""
        uses, definitions = [], []
        for block in self.blocks:
            use, define = set(), set()
            for i in self.instructions[block.start : block.end]:
                reads, writes = effects(i)
                use |= reads - define
                if i.guard:
                    use |= writes - define
                else:
                    define |= writes
            uses.append(use)
            definitions.append(define)
        live_in = [set(u) for u in uses]
        live_out = [set() for _ in self.blocks]
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                n = block.index
                out = set().union(*(live_in[t] for t in block.targets if t < len(self.blocks)))
                if len(out) != len(live_out[n]):
                    live_out[n], changed = out, True
                    live_in[n] = uses[n] | (out - definitions[n])
        return live_out

    def run_block(self, n: int, machine, chosen, mask):
        block = self.blocks[n]
        if block.function is None:
            code = Code(self, block)
            block.function, block.source = code.compile(), code.text
        return block.function(machine, machine.registers, chosen, mask)


def _layout(variables) -> tuple[dict[str, int], int]:
    """Offsets of variables and their size in all, those without a size last."""
    offsets, size = {}, 0
    for v in sorted(variables, key=lambda v: v.size == 0):
        size = -(-size // v.align) * v.align
        offsets[v.name] = size
        size += v.size
    return offsets, size


def _granule(code: list[Instruction], space: str) -> int:
    """Bytes of the smallest access to a space, at most 4: races are kept by these."""
    sizes = [4]
    for i in code:
        if i.base in ("ld", "st", "atom", "red") and not i.has("param"):
            if i.has(space) or not any(i.has(x) for x in ("shared", "global", "local")):
                sizes.append(SIZES[i.type])
    return min(sizes)


def effects(i: Instruction) -> tuple[set[str], set[str]]:
    """Registers that an instruction reads and writes."""
    reads, writes = set(), set()
    results = 0 if i.base in NO_RESULT or i.base == "mbarrier" and i.has("init") else 1
    if i.base in ("mbarrier", "red", "atom"):
        first = i.operands[0]
        results = 0 if isinstance(first, Address) else 1
    for n, operand in enumerate(i.operands):
        _collect(operand, writes if n < results else reads, reads)
    if i.base == "wgmma" and i.has("mma_async"):
        reads |= writes
    if i.guard:
        reads.add(i.guard.name)
    return reads, writes


NO_RESULT = {"st", "bra", "brx", "bar", "barrier", "cp", "ret", "exit", "fence", "red", "stmatrix",
             "setmaxnreg", "tensormap", "membar", "prefetch", "discard", "trap", "nanosleep",
             "griddepcontrol"}  # fmt: skip


def _collect(operand, into: set, reads: set) -> None:
    if isinstance(operand, Register):
        into.add(operand.name)
    elif isinstance(operand, Vector):
        for item in operand.items:
            _collect(item, into, reads)
    elif isinstance(operand, Pair):
        _collect(operand.first, into, reads)
        _collect(operand.second, into, reads)
    elif isinstance(operand, Address):
        _collect(operand.base, reads, reads)
        for item in operand.coordinates:
            _collect(item, reads, reads)


class Code:
    """Python source of one block, written instruction by instruction."""

    def __init__(self, program: Program, block: Block):
        self.program, self.block = program, block
        self.space = {"np": np, "get": get, "keep": keep}
        self.loads, self.lines = [], []
        self.current: dict[str, dict[str, str]] = {}  # register -> NumPy type -> variable
        self.written: set[str] = set()
        self.count = 0
        self.result = "None"
        self.text = ""

    # names and values

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def let(self, expression: str) -> str:
        """A new variable that holds an expression."""
        name = self.fresh()
        self.lines.append(f"{name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        self.lines.append(statement)

    def thing(self, value, hint: str = "k") -> str:
        """The name of an object that the code uses: a function, a constant."""
        name = getattr(value, "__name__", "")
        if callable(value) and name.isidentifier():
            name = f"{hint}_{name}"
            if self.space.get(name, value) is value:
                self.space[name] = value
                return name
        self.count += 1
        name = f"{hint}{self.count}"
        self.space[name] = value
        return name

    def call(self, function, *arguments) -> str:
        return f"{self.thing(function, 'f')}({', '.join(map(str, arguments))})"

    def read(self, operand, kind: str) -> str:
        """A variable that holds an operand as a PTX type."""
        dtype = NUMPY[kind]
        if isinstance(operand, Register):
            value = self._register(operand.name, dtype)
            return self.let(f"~{value}") if operand.negated else value
        if isinstance(operand, Immediate):
            return self._immediate(operand, dtype)
        if isinstance(operand, Name):
            return self._name(operand.name, dtype)
        raise TypeError(operand)

    def _register(self, name: str, dtype: str) -> str:
        number = self.program.numbers[name]
        own = self.program.sizes[number]
        views = self.current.get(name)
        if views is None:
            self.loads.append(f"r{number} = get(R[{number}], s)")
            views = self.current[name] = {own: f"r{number}"}
        if dtype in views:
            return views[dtype]
        if own not in views:
            views[own] = self.let(f"{next(iter(views.values()))}.view('{own}')")
        value, size = views[own], np.dtype(dtype).itemsize
        if own == "?" or dtype == "?":
            raise TypeError(f"{name} is no {dtype}")
        if size == np.dtype(own).itemsize:
            views[dtype] = self.let(f"{value}.view('{dtype}')")
        elif size < np.dtype(own).itemsize:
            views[dtype] = self.let(f"{value}.astype('u{size}').view('{dtype}')")
        else:
            raise TypeError(f"{name} is narrower than {dtype}")
        return views[dtype]

    def _immediate(self, operand: Immediate, dtype: str) -> str:
        kind = np.dtype(dtype)
        if operand.float_bits:
            bits = np.array([[operand.value]], f"u{operand.float_bits // 8}")
            if kind.itemsize != bits.itemsize:
                bits = bits.view(f"f{bits.itemsize}").astype(f"f{kind.itemsize}")
            value = bits.view(kind)
        elif kind.kind == "f":
            value = np.array([[operand.value]], kind)
        elif kind.kind == "b":
            value = np.array([[bool(operand.value)]])
        else:
            mask = (1 << 8 * kind.itemsize) - 1
            value = np.array([[operand.value & mask]], f"u{kind.itemsize}").view(kind)
        return self.thing(value)

    def _name(self, name: str, dtype: str) -> str:
        if name in self.program.shared:
            return self._immediate(Immediate(self.program.shared[name]), dtype)
        if name in self.program.param_offsets:
            return self._immediate(Immediate(self.program.param_offsets[name]), dtype)
        return self.let(f"M.special('{name}', s).astype('{dtype}')")

    def write(self, operand, kind: str, expression: str, guard: Register | None = None) -> None:
        """Let a register hold an expression of a PTX type; lanes off `guard` keep what they had."""
        if isinstance(operand, Name):
            if operand.name != "_":
                raise TypeError(operand)
            return
        name, dtype = operand.name, NUMPY[kind]
        own = self.program.sizes[self.program.numbers[name]]
        if np.dtype(dtype).itemsize < np.dtype(own).itemsize:
            signed = "i" if dtype[0] == "i" else "u"
            if dtype[0] == "f":
                expression = f"({expression}).view('u{dtype[1]}')"
            expression = f"({expression}).astype('{signed}{own[1]}').view('{own}')"
            dtype = own
        if guard is not None:
            # only where needed: the old value of a register that nobody set is 0
            old = self._register(name, dtype)
            expression = f"np.where({self.read(guard, 'pred')}, {expression}, {old})"
        self.current[name] = {dtype: self.let(expression)}
        self.written.add(name)

    # what instructions have in common

    def mask(self, i: Instruction) -> str:
        """The lanes for which an instruction has effects: None, or a variable."""
        if i.guard is None:
            return "m"
        return self.let(f"{self.thing(both, 'f')}(m, {self.read(i.guard, 'pred')})")

    def address(self, operand: Address) -> str:
        """Sum of a register and an offset, in the width of the register."""
        width = 64 if self._wide(operand.base) else 32
        base = self.read(operand.base, f"u{width}")
        offset = operand.offset & ((1 << width) - 1)
        return self.let(f"({base} + {offset}).astype('i8')" if offset else f"{base}.astype('i8')")

    def _wide(self, base) -> bool:
        if isinstance(base, Register):
            return self.program.sizes[self.program.numbers[base.name]] == "u8"
        return isinstance(base, Immediate)

    def compile(self):
        program, block = self.program, self.block
        for i in program.instructions[block.start : block.end]:
            emit = OPCODES.get(i.base)
            if emit is None:
                raise unknown(i)
            try:
                emit(self, i)
            except (KeyError, TypeError, IndexError) as error:
                raise unknown(i) from error
        kept = sorted(self.written & program.live[block.index])
        stores = []
        for name in kept:
            number = program.numbers[name]
            stores.append((number, self._register(name, program.sizes[number])))
        body = [*self.loads, *self.lines]
        if stores:
            numbers, values = zip(*stores, strict=True)
            body.append(f"keep(M, R, {numbers}, ({', '.join(values)},), s, m)")
        body.append(f"return {self.result}")
        self.text = "def block(M, R, s, m):\n" + "\n".join(f"    {x}" for x in body)
        exec(_compiled(self.text, program.kernel.name), self.space)
        return self.space["block"]


@functools.cache
def _compiled(text: str, kernel: str):
    """Kernels that differ by a planted fault have most of their blocks in common."""
    return compile(text, f"<a block of {kernel}>", "exec")


def get(value: np.ndarray, chosen) -> np.ndarray:
    """A register, for the warps that run."""
    return value if chosen is None or value.shape[0] == 1 else value[chosen]


def keep(machine, registers: list, numbers, values, chosen, mask) -> None:
    """Write registers, for some warps or lanes."""
    if chosen is None and mask is None:
        for number, value in zip(numbers, values, strict=True):
            registers[number] = value
    else:
        for number, value in zip(numbers, values, strict=True):
            put(machine, registers, number, value, chosen, mask)


def put(machine, registers: list, number: int, value: np.ndarray, chosen, mask) -> None:
    """Write a register for some warps or lanes, and leave it as it is for others."""
    old = registers[number]
    wide = max(old.shape[1], value.shape[1], 1 if mask is None else mask.shape[1])
    new = np.empty((machine.warps, wide), value.dtype)
    new[:] = old
    if chosen is None:
        np.copyto(new, value, where=mask)
    elif mask is None:
        new[chosen] = value
    else:
        new[chosen] = np.where(mask, value, new[chosen])
    registers[number] = new


def both(mask, predicate: np.ndarray) -> np.ndarray:
    return predicate if mask is None else mask & predicate
