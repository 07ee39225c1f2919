"""Instructions that a call executes, counted by kernel and kind.

`python -m tests.emulator.counts [--arch 90] [--only TEXT]` prints those of the calls of calls.py, a
warp's share each. For a tile or a chunk, count two calls that differ by some of them:

    small, large = (instruction_counts(lambda n=n: forward(n)) for n in (256, 512))
    each = per_step(small["forward_kernel"], large["forward_kernel"], steps)
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable

from .calls import calls
from .device import emulating
from .machine import Options
from .parser import Instruction
from .program import Program

Counts = collections.Counter


def kind(i: Instruction) -> str:
    """An opcode with what tells its cost: a memory's space, a float's type."""
    if i.base in ("ld", "st", "atom", "red"):
        space = next((x for x in ("shared", "global", "param") if i.has(x)), "generic")
        return f"{i.base}.{space}"
    if i.base in ("cp", "wgmma", "mbarrier", "fence"):
        return ".".join(i.parts[: 3 if i.has("bulk") else 2])
    return f"{i.base}.{i.type}" if i.type in ("f16", "f32", "f64", "f16x2", "bf16x2") else i.base


def executed(program: Program, blocks: Counts) -> Counts:
    """Instructions by kind, of the warps that ran each block."""
    total = Counts()
    for n, count in blocks.items():
        block = program.blocks[n]
        for i in program.instructions[block.start : block.end]:
            total[kind(i)] += count
    return total


def instruction_counts(run: Callable[[], object], arch: int = 90) -> dict[str, Counts]:
    """Instructions of all warps of a call, by kernel and kind. Races are not looked for."""
    found: dict[str, Counts] = {}
    with emulating(arch, Options(check_races=False)) as device:
        run()
    for launch in device.launches:
        found.setdefault(launch.kernel, Counts()).update(executed(launch.program, launch.counts))
    return found


def per_step(small: Counts, large: Counts, steps: float) -> dict[str, float]:
    """Instructions of one of the `steps` that a larger call has more, most frequent first."""
    more = {name: (large[name] - small[name]) / steps for name in large | small}
    return {n: x for n, x in sorted(more.items(), key=lambda item: -abs(item[1])) if x}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90))
    parser.add_argument("--only", default="", help="calls whose name holds this text")
    options = parser.parse_args()
    for name, run in calls(options.arch).items():
        if options.only not in name:
            continue
        with emulating(options.arch, Options(check_races=False)) as device:
            run()
        for launch in device.launches:
            total, warps = executed(launch.program, launch.counts), launch.warps
            most = ", ".join(f"{k} {c / warps:.1f}" for k, c in total.most_common())
            print(f"{name}: {launch.kernel}, {warps} warps, {total.total() / warps:.0f} each: {most}")  # fmt: skip # noqa: E501


if __name__ == "__main__":
    main()
