"""Opcodes, by base name: functions that write Python for an instruction into a block's code."""

from __future__ import annotations

from collections.abc import Callable

OPCODES: dict[str, Callable] = {}


def opcode(*names: str):
    """Register the emitter of instructions: `emit(code, instruction)`."""

    def add(emit):
        for name in names:
            assert name not in OPCODES, name
            OPCODES[name] = emit
        return emit

    return add


class UnknownInstruction(NotImplementedError):
    """An instruction, a modifier or a type that the emulator does not know."""


def unknown(instruction) -> UnknownInstruction:
    return UnknownInstruction(f"unknown instruction {instruction.op}: {instruction}")
