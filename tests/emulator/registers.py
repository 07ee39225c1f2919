"""Registers of products in flight: who may touch them.

Between a wgmma and the wait that covers it nobody may read or write its registers, but for products
of the same shape that add to the same ones. What other instructions read or wrote, a product may
use only after wgmma.fence. Blocks are followed for each warp by a small state, and what a block
does to a state is worked out once.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .parser import Register, Vector


@dataclasses.dataclass(frozen=True)
class State:
    """`flight`: committed groups, oldest first, then the open one; each of (register, product).
    `dirty`: registers used since the last fence, with the instruction that did. `fenced`: whether
    there was a fence at all.
    """

    flight: tuple = (frozenset(),)
    dirty: frozenset = frozenset()
    fenced: bool = False


class RegisterState:
    """State of each warp; only kernels with wgmma have one."""

    def __init__(self, machine):
        self.machine, program = machine, machine.program
        self.products = [
            i for i in program.instructions if i.base == "wgmma" and i.has("mma_async")
        ]
        if not self.products:
            return
        cached = program.__dict__.setdefault("register_states", None)
        if cached is None:
            program.register_states = cached = _Moves(program, self.products)
        self.moves = cached
        self.state = np.full(machine.warps, cached.number(State()))

    def enter(self, block, chosen) -> None:
        if not self.products:
            return
        warps = slice(None) if chosen is None else chosen
        before = self.state[warps]
        after = before.copy()
        for number in set(before.tolist()):
            here = before == number
            after[here], faults = self.moves.through(number, block)
            if faults and self.machine.options.check_races:
                kind, i, register, other = faults[0]
                first = int(np.argmax(here))
                warp = first if chosen is None else int(chosen[first])
                self.machine.report(i, f"{kind}: {register}", warp, 0, 0, str(other))
        self.state[warps] = after


class _Moves:
    def __init__(self, program, products):
        self.program = program
        self.states: list[State] = []
        self.numbers: dict[State, int] = {}
        self.known: dict[tuple[int, int], tuple] = {}
        self.relevant = set()
        for i in products:
            self.relevant |= set(_names(i.operands[0])) | set(_names(i.operands[1]))
        # a register copied into one of them is the same one to an assembler
        self.tracked, before = set(self.relevant), 0
        while len(self.tracked) > before:
            before = len(self.tracked)
            self.tracked |= {b for a, b in map(_copy, program.instructions) if a in self.tracked}

    def number(self, state: State) -> int:
        if state not in self.numbers:
            self.numbers[state] = len(self.states)
            self.states.append(state)
        return self.numbers[state]

    def through(self, number: int, block):
        key = number, block.index
        if key not in self.known:
            state, faults = self._walk(self.states[number], block)
            self.known[key] = self.number(state), faults
        return self.known[key]

    def _walk(self, state: State, block):
        from .program import effects

        flight, dirty, faults = list(state.flight), dict(state.dirty), []
        fenced = state.fenced
        for i in self.program.instructions[block.start : block.end]:
            reads, writes = effects(i)
            if i.base == "wgmma":
                if i.has("fence"):
                    dirty, fenced = {}, True
                elif i.has("commit_group"):
                    flight.append(frozenset())
                elif i.has("wait_group"):
                    keep = i.operands[0].value
                    flight = flight[-1 - keep :]
                else:
                    if not fenced:
                        faults.append(("no wgmma.fence before the first product", i, "", ""))
                    self._product(i, flight, dirty, faults)
                continue
            touched = (reads | writes) & self.relevant
            if touched:
                for group in flight:
                    for register, owner, role in group:
                        if register in touched and not (role == "a" and register not in writes):
                            faults.append(("register of a product in flight", i, register,
                                           self.program.instructions[owner]))  # fmt: skip
            to, source = _copy(i)
            if to in self.tracked:
                dirty.pop(to, None)
                if source in dirty:
                    dirty[to] = dirty[source]
            else:
                dirty |= dict.fromkeys((reads | writes) & self.tracked, i.index)
        while len(flight) > 1 and not flight[0]:
            flight.pop(0)
        return State(tuple(flight), frozenset(dirty.items()), fenced), faults

    def _product(self, i, flight, dirty, faults) -> None:
        results = _names(i.operands[0])
        sources = _names(i.operands[1]) if isinstance(i.operands[1], Vector) else []
        for register in (*results, *sources):
            if register in dirty:
                faults.append(("no wgmma.fence after a use of a product's register", i, register,
                               self.program.instructions[dirty[register]]))  # fmt: skip
        for group in flight:
            for register, owner, role in group:
                same = self.program.instructions[owner].op == i.op and role == "d"
                if register in results and not same or (register in sources and role == "d"):
                    faults.append(("register of a product in flight", i, register,
                                   self.program.instructions[owner]))  # fmt: skip
        entries = {(r, i.index, "d") for r in results} | {(r, i.index, "a") for r in sources}
        flight[-1] = flight[-1] | entries


def _copy(i) -> tuple[str | None, str | None]:
    """(to, from) of a plain move between registers."""
    if i.base == "mov" and not i.guard and all(isinstance(x, Register) for x in i.operands):
        return i.operands[0].name, i.operands[1].name
    return None, None


def _names(operand) -> list[str]:
    if isinstance(operand, Vector):
        return [x.name for x in operand.items if isinstance(x, Register)]
    return []
