"""Scheduler of warps. Lanes of a warp that part are run by the lowest block first, so that they
meet again where their branches end.
"""

from __future__ import annotations

import numpy as np

from .copies import copies_of
from .registers import RegisterState

READY, AT_BARRIER, STALLED, DONE = range(4)


class Scheduler:
    """Runs the blocks of one batch of CTAs to their end."""

    def __init__(self, machine):
        self.machine, self.program = machine, machine.program
        self.end = len(self.program.blocks)
        warps = machine.warps
        self.at = np.zeros((warps, 32), "i4")  # the block of every lane
        self.state = np.full((warps, 32), READY, "i1")
        lanes = machine.threads - np.arange(warps) % machine.warps_per_cta * 32
        self.missing = np.arange(32)[None, :] >= lanes[:, None]
        self.state[self.missing] = DONE
        machine.exited = self.state == DONE
        self.barrier = np.full(warps, -1)
        self.barrier_threads = np.zeros(warps, int)
        self.steps = 0
        self.turn = 0
        self.registers = RegisterState(machine)
        self.ahead = int(machine.draw.integers(machine.warps_per_cta))

    def run(self) -> None:
        together = self.machine.options.order == "together"
        block = 0 if not self.missing.any() and together else None
        while True:
            if block is not None:
                block = self._run_together(block)
                if block is None and (self.state == DONE).all():
                    break
                continue
            chosen = self._choose()
            if chosen is None:
                break
            self._run_some(*chosen)
            if together:
                block = self._together()
        self._finish()

    # everything in one place

    def _together(self) -> int | None:
        first = int(self.at[0, 0])
        if (self.state == READY).all() and (self.at == first).all():
            return first
        return None

    def _run_together(self, n: int) -> int | None:
        """Run a block for all lanes; the next one for all, or None when they part."""
        block = self.program.blocks[n]
        self._count(block, self.machine.warps)
        self.registers.enter(block, None)
        result = self.program.run_block(n, self.machine, None, None)
        kind = block.kind
        if kind == "jump":
            following = block.targets[0]
            if following < self.end:
                return following
        elif kind == "branch":
            if result.all():
                return block.targets[0]
            if not result.any():
                return block.targets[1]
        elif kind == "barrier" and self._one_barrier(result):
            self.machine.races.whole_barrier(
                self.machine.all_warps.reshape(self.machine.ctas, self.machine.warps_per_cta)
            )
            return block.targets[0]
        elif kind == "wait" and result.all():
            return block.targets[0]
        self.at[:] = n
        self._apply(block, result, None, None)
        return None

    def _one_barrier(self, result) -> bool:
        number, threads = result
        if number.size > 1 and (number != number.flat[0]).any():
            return False
        return threads is None or (threads == self.machine.threads).all()

    # some warps or lanes

    def _choose(self):
        """(warps, mask, block) to run next, None when all are done."""
        ready = self.state == READY
        if not ready.any():
            ready = self._wake()
            if ready is None:
                return None
        order = self.machine.options.order
        if self.machine.options.landing == "drawn" and self.machine.draw.random() < 0.2:
            self._land_one()
        able = ready.any(1)
        rows = np.nonzero(able if order == "together" else able & self._turn(able))[0]
        live, at = ready[rows], self.at[rows]
        block = int(at[live].min())
        live &= at == block
        there = live.any(1)
        chosen, mask = rows[there], live[there]
        if mask.all():
            mask = None
        if len(chosen) == self.machine.warps:
            chosen = None
        return chosen, mask, block

    def _turn(self, able) -> np.ndarray:
        """The warps whose turn it is: one of every CTA."""
        machine = self.machine
        per_cta, own = machine.warps_per_cta, machine.races.own
        if machine.options.order == "ahead":
            if machine.draw.random() < 0.02:
                self.ahead = int(machine.draw.integers(per_cta))
            start = self.ahead
        else:
            self.turn += 1
            start = self.turn
        some = able.reshape(-1, per_cta).any(0).tolist()
        return own == next(w for n in range(per_cta) if some[w := (start + n) % per_cta])

    def _wake(self):
        """Nobody is ready: land copies, look at mbarriers again; else it is a deadlock."""
        machine = self.machine
        if (self.state == DONE).all():
            return None
        if self._land_one(everything=machine.options.landing == "early") or machine.progress:
            machine.progress = False
            self.state[self.state == STALLED] = READY
            if (self.state == READY).any():
                return self.state == READY
        if self._release():
            return self.state == READY
        self._deadlock()
        return None

    def _land_one(self, everything: bool = False) -> bool:
        copies = self.machine.copies
        if copies is None or not copies.bulk:
            return False
        n = int(self.machine.draw.integers(len(copies.bulk)))
        copies.bulk.pop(n).land(self.machine)
        self.state[self.state == STALLED] = READY
        return True

    def _run_some(self, chosen, mask, n: int) -> None:
        block = self.program.blocks[n]
        count = self.machine.warps if chosen is None else len(chosen)
        self._count(block, count)
        self.registers.enter(block, chosen)
        result = self.program.run_block(n, self.machine, chosen, mask)
        self._apply(block, result, chosen, mask)
        if self.machine.progress:
            self.machine.progress = False
            self.state[self.state == STALLED] = READY

    def _apply(self, block, result, chosen, mask) -> None:
        """Move the lanes that ran a block on to where they go."""
        rows = slice(None) if chosen is None else chosen
        at, state = self.at[rows], self.state[rows]
        live = state != DONE if mask is None else mask & (state != DONE)
        kind, targets = block.kind, block.targets
        if kind == "jump":
            at[live] = targets[0]
        elif kind == "branch":
            np.copyto(at, np.where(result, *targets), where=live)
        elif kind == "table":
            np.copyto(at, np.array(targets)[result], where=live)
        elif kind == "exit":
            if targets:
                at[live] = targets[0]
            state[live if result is None else live & result] = DONE
        elif kind == "wait":
            at[live & result] = targets[0]
            state[live & ~result] = STALLED
        elif kind == "barrier":
            self._arrive(block, result, chosen, live, state)
            at[live] = targets[0]
        leaves = kind == "exit" or self.end in targets
        if leaves:
            state[live & (at >= self.end)] = DONE
        self.at[rows], self.state[rows] = at, state
        if leaves:
            self.machine.exited = self.state == DONE
        if kind == "barrier" or leaves:
            self._release()

    def _arrive(self, block, result, chosen, live, state) -> None:
        machine = self.machine
        instruction = self.program.instructions[block.end - 1]
        warps = machine.all_warps if chosen is None else chosen
        apart = live.any(1, keepdims=True) & ~live & (state != DONE)
        if apart.any():
            machine.report_lanes(instruction, "diverged: lanes of a warp part at a barrier", apart,
                                 np.zeros((1, 1)), chosen)  # fmt: skip
        number, threads = result
        self.barrier[warps] = np.broadcast_to(number, (len(warps), number.shape[1]))[:, 0]
        if threads is None:
            self.barrier_threads[warps] = 0
        else:
            self.barrier_threads[warps] = np.broadcast_to(threads, (len(warps), threads.shape[1]))[
                :, 0
            ]
        state[live] = AT_BARRIER

    def _release(self) -> bool:
        """Let go of the barriers at which all have arrived."""
        machine = self.machine
        waiting = (self.state == AT_BARRIER).any(1)
        if not waiting.any():
            return False
        shape = (machine.ctas, machine.warps_per_cta)
        free = False
        ids = np.where(waiting, self.barrier, -1).reshape(shape)
        gone = (self.state == DONE).all(1).reshape(shape)
        for number in np.unique(ids[ids >= 0]):
            here = ids == number
            threads = np.where(here, self.barrier_threads.reshape(shape), 0).max(1)
            # without a count, all warps that have not ended
            expected = np.where(threads > 0, threads // 32, (~gone).sum(1))
            arrived = here.sum(1)
            full = (arrived == expected) & here.any(1)
            if not full.any():
                continue
            free = True
            members = here & full[:, None]
            rows = machine.all_warps.reshape(shape)
            sizes = members.sum(1)
            for size in np.unique(sizes[sizes > 0]):
                some = members & (sizes == size)[:, None]
                machine.races.whole_barrier(rows[some].reshape(-1, size))
            warps = rows[members]
            self.barrier[warps] = -1
            state = self.state[warps]
            state[state == AT_BARRIER] = READY
            self.state[warps] = state
        return free

    def _deadlock(self) -> None:
        machine = self.machine
        stuck = (self.state == STALLED) | (self.state == AT_BARRIER)
        row, lane = np.argwhere(stuck)[0]
        others = sorted({int(self.at[r, n]) for r, n in np.argwhere(stuck)})
        places = []
        for n in others:
            start = self.program.blocks[n].start if n < self.end else len(self.program.instructions)
            barrier = start - 1 if (self.state[self.at == n] == AT_BARRIER).any() else start
            places.append(str(self.program.instructions[barrier]))
        block = int(self.at[row, lane])
        start = self.program.blocks[block].start
        if self.state[row, lane] == AT_BARRIER:
            start -= 1
        instruction = self.program.instructions[start]
        machine.report(instruction, "deadlock", int(row), int(lane), 0, "; ".join(places[:6]))
        self.state[:] = DONE

    def _finish(self) -> None:
        machine = self.machine
        copies = copies_of(machine)
        if copies.bulk:
            copy = copies.bulk[0]
            warp = copy.cta * machine.warps_per_cta
            machine.report(copy.instruction, "a copy is under way when its CTA ends", warp, 0, 0)
        copies.finish(None, machine.all_warps, None)
        if machine.stores is not None and machine.stores.under_way:
            store = machine.stores.under_way[0]
            kind = "a store reads shared memory when its CTA ends"
            machine.report(store.instruction, kind, store.warp, store.lane, 0)
        if machine.issued.any():
            shape = (machine.ctas, -1, 4)
            each = machine.issued.reshape(shape) if machine.warps_per_cta % 4 == 0 else None
            if each is None or (each != each[..., :1]).any():
                i = next(x for x in self.program.instructions if x.has("mma_async"))
                machine.report(i, "diverged: not all warps of a group took part", 0, 0, 0)

    def _count(self, block, warps: int) -> None:
        self.steps += 1
        self.machine.counts[block.index] += warps
