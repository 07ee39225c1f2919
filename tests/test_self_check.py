"""`python -m flashmark` prints the configuration and checks each backend that can run."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import flashmark
from flashmark import __main__ as self_check
from flashmark import block_sparse, cpu
from flashmark.dispatch import CAN_RUN


def test_every_backend_that_can_run_is_checked_and_passes(capsys):
    assert self_check.main() == 0
    text = capsys.readouterr().out
    assert text.startswith(flashmark.show_config())
    assert text.splitlines()[-1].startswith("all passed in ")
    for operator in self_check.OPERATORS:
        for backend, can_run in CAN_RUN.items():
            checked = f"{operator} on cpu, {backend}, float32 " in text
            assert checked == can_run(operator, torch.empty(1, 1, 1, 1))


def test_a_wrong_result_and_an_error_each_fail(monkeypatch, capsys):
    @functools.wraps(flashmark.block_sparse_attention)
    def wrong(*args, **kwargs):
        return block_sparse.block_sparse_attention(*args, **kwargs) * 1.001

    @functools.wraps(flashmark.nystrom_attention)
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(flashmark, "block_sparse_attention", wrong)
    monkeypatch.setattr(flashmark, "nystrom_attention", broken)
    monkeypatch.setattr(self_check, "DTYPES", (torch.float32,))
    assert self_check.main() == 1
    text = capsys.readouterr().out
    assert "OVER BUDGET" in text and "RAISED RuntimeError: no such kernel" in text
    assert "FAILED in " in text.splitlines()[-1]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder in which flashmark.cpu looks for its library, as `write(bytes)` leaves it."""
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    cpu._load.cache_clear()
    yield lambda content: (tmp_path / cpu._LIBRARIES["AVX2"]).write_bytes(content)
    cpu._load.cache_clear()


needs_x86 = pytest.mark.skipif(cpu._NEON, reason="the libraries of x86-64")


@needs_x86
@pytest.mark.parametrize("built", ["2.1.9", "1.13.0", None], ids=str)
def test_library_of_another_torch_is_not_loaded_and_says_so(library, built):
    library(b"\x7fELF" + (f"flashmark built with torch {built}\0".encode() if built else b""))
    with pytest.warns(UserWarning, match="slower PyTorch code"):
        reason = cpu.why_not()
    assert f"built with torch {built or 'an unknown version'}" in reason
    assert torch.__version__ in reason and "install flashmark again" in reason


@needs_x86
def test_library_of_this_torch_is_loaded_whatever_its_patch_release(library):
    major, minor = torch.__version__.split(".")[:2]
    library(f"flashmark built with torch {major}.{minor}.99\0".encode())
    assert "could not be loaded" in cpu.why_not()  # the attempt was made


@needs_x86
def test_library_for_another_instruction_set_is_named(library, tmp_path):
    (tmp_path / cpu._LIBRARIES["AVX512"]).write_bytes(b"")
    assert "not built for AVX2" in cpu.why_not() and "_cpu_avx512.so" in cpu.why_not()


@pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")
def test_built_library_says_which_torch_it_belongs_to():
    name = "DEFAULT" if cpu._NEON else torch.backends.cpu.get_cpu_capability()
    path = Path(cpu.__file__).with_name(cpu._LIBRARIES[name])
    assert b"flashmark built with torch " in path.read_bytes()
