"""The committed table: no fault, errors like PyTorch's, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import table
from .calls import calls

ROWS = table.read()
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arch", [80, 90])
def test_it_has_the_calls(arch):
    ran = {row.call for row in ROWS if (row.triton, row.arch) == ("3.7.1", arch)}
    assert ran == calls(arch).keys()
    assert {row.call for row in ROWS if row.arch == arch} <= calls(arch).keys()


def test_it_has_every_kernel():
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cu")]
    name = r"(?:^def|__launch_bounds__\(.*?\))\s+(\w+_kernel)\("
    found = {x for path in sources for x in re.findall(name, path.read_text(), re.M)}
    assert found == {row.kernel for row in ROWS}


def test_no_fault_and_errors_within_twice_pytorch_s():
    assert {row.faults for row in ROWS} == {"0"}
    assert [row for row in ROWS if not row.error <= table.allowed(row.pytorch)] == []


def test_the_page_shows_the_table():
    assert table.PAGE.read_text() == table.draw()
