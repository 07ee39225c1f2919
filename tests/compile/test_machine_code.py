"""The reader of machine code finds the faults that it is for, planted in short listings, and the
table of budgets tells worse from better.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.compile import machine_code
from tests.compile.budgets import Figures

SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
OUTPUT = "HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56, gsb0"
ARRIVE, WAIT, WAIT_ONE = (
    "WARPGROUP.ARRIVE",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
)


def code(*lines: str) -> machine_code.Code:
    """Instructions one after the other; a line that ends with a colon is a label."""
    listing, address = [], 0
    for line in lines:
        if line.endswith(":"):
            listing.append(line)
        else:
            listing.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return machine_code.parse("\n".join(listing))


def turns(found: machine_code.Code) -> list[tuple[int, int]]:
    """(instructions, products) of a turn of each loop with products."""
    return [(len(loop.body), loop.products) for loop in found.product_loops()]


def faults(*lines: str) -> list[str]:
    return machine_code.hazards(code(*lines, "EXIT"))


def test_products_in_order_are_clear():
    assert faults(ARRIVE, SCORES, WAIT, "FADD R24, R24, R1", ARRIVE, OUTPUT, WAIT) == []


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("FADD R2, R24, R1", "reads an accumulator"),
        ("STG.E.128 desc[UR4][R2.64], R52", "reads an accumulator"),
        ("IMAD.MOV.U32 R55, RZ, RZ, R2", "writes an accumulator"),
        ("LDS.128 R52, [R2]", "writes an accumulator"),
    ],
)
def test_an_accumulator_in_flight_is_left_alone(instruction, fault):
    (found,) = faults(ARRIVE, SCORES, instruction, WAIT)
    assert fault in found and instruction in found
    assert faults(ARRIVE, SCORES, WAIT, instruction) == []


def test_a_left_operand_in_registers_is_not_written():
    (found,) = faults(ARRIVE, OUTPUT, "F2FP.BF16.F32.PACK_AB R90, R2, R3", WAIT)
    assert "writes the left operand" in found
    assert faults(ARRIVE, OUTPUT, "FADD R2, R90, R3", WAIT) == []


def test_waiting_for_all_but_one_leaves_the_last_in_flight():
    lines = (ARRIVE, SCORES, OUTPUT, WAIT_ONE)
    assert faults(*lines, "FADD R2, R24, R1", WAIT) == []
    assert len(faults(*lines, "FADD R2, R56, R1", WAIT)) == 1


def test_a_wait_on_one_path_alone_is_no_wait():
    lines = (ARRIVE, SCORES, "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", "FADD R2, R24, R1")
    assert len(faults(*lines)) == 1


def test_a_product_of_the_last_turn_is_in_flight_in_the_next():
    lines = (".L_x_0:", "FADD R2, R24, R1", ARRIVE, SCORES, "@P0 BRA `(.L_x_0)")
    assert len(faults(*lines)) == 1


def test_products_that_wait_for_each_other_are_serialised():
    apart = code(ARRIVE, SCORES, WAIT, ARRIVE, OUTPUT, WAIT)
    together = code(ARRIVE, SCORES, SCORES, OUTPUT, WAIT)
    assert machine_code.serialised(apart) and not machine_code.serialised(together)


def test_a_product_that_writes_nothing_closes_a_group():
    closing = "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0"
    left_open = SCORES.replace(", gsb0", "")
    assert len(faults(ARRIVE, left_open, closing, "FADD R2, R24, R1", WAIT)) == 1
    assert faults(ARRIVE, left_open, closing, WAIT, "FADD R2, R24, R1") == []
    apart = ARRIVE, SCORES, WAIT, ARRIVE, OUTPUT, WAIT
    assert machine_code.serialised(code(*apart, closing))


def test_registers_beyond_a_grant_are_found():
    lines = ("USETMAXREG.DEALLOC.CTAPOOL 0x18", "FADD R23, R1, R2", "USETMAXREG.TRY_ALLOC 0xf0")
    assert machine_code.beyond_grants(code(*lines, "FADD R239, R1, R2")) == []
    assert len(machine_code.beyond_grants(code(*lines, "FADD R240, R1, R2"))) == 1
    assert len(machine_code.beyond_grants(code(lines[0], "FADD R24, R1, R2"))) == 1
    assert machine_code.beyond_grants(code("FADD R200, R1, R2")) == []  # none was asked for


def test_loops_are_the_inner_ones_with_products():
    idle = ["FADD R1, R2, R3"] * 20
    inner = [".L_x_1:", ARRIVE, SCORES, WAIT, *idle, "@P0 BRA `(.L_x_1)"]
    empty = [".L_x_2:", *idle, "@P0 BRA `(.L_x_2)"]
    whole = code(".L_x_0:", *empty, *inner, "@P0 BRA `(.L_x_0)", "EXIT")
    assert turns(whole) == [(len(inner) - 1, 1)]


def test_a_long_stretch_that_is_jumped_over_is_rare():
    rare = ["FMUL R1, R2, R3"] * 20
    inner = [ARRIVE, SCORES, WAIT, "@P1 BRA `(.L_x_1)", *rare, ".L_x_1:", "@P0 BRA `(.L_x_0)"]
    assert turns(code(".L_x_0:", *inner, "EXIT")) == [(5, 1)]
    inner[3] = "NOP"
    assert turns(code(".L_x_0:", *inner, "EXIT")) == [(25, 1)]


@pytest.mark.parametrize("name", ["spilled", "serialised", "full", "partial"])
def test_a_figure_that_rises_is_worse(name):
    before = Figures(128, 0, 0, 300, 400)
    after = dataclasses.replace(before, **{name: getattr(before, name) + 1})
    assert [x.split(":")[0] for x in after.worse_than(before)] == [name]
    assert before.worse_than(after) == []


def test_registers_are_worse_where_a_program_less_fits():
    before = Figures(128, 0, 0, 300, 400)
    assert dataclasses.replace(before, registers=129).worse_than(before)
    assert not dataclasses.replace(before, registers=127).worse_than(before)
    alone = dataclasses.replace(before, registers=200)
    assert not dataclasses.replace(before, registers=255).worse_than(alone)
