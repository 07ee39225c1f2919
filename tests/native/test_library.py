"""The native library by itself: found or missed with a reason, and loadable by an older torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flashmark import masks, native
from tests.native.cases import needs_native

ALLOWED = Path(__file__).with_name("stable_abi_symbols.txt")


def undefined_symbols() -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    library = Path(native.__file__).with_name("_native.so")
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


@needs_native
def test_every_torch_symbol_is_one_that_the_oldest_torch_has():
    used = {name for name in undefined_symbols() if name.startswith(("aoti_torch_", "torch_"))}
    assert used
    assert used <= set(ALLOWED.read_text().split())


@needs_native
def test_no_symbol_of_the_unstable_interface_is_used():
    """C++ names of c10, at, caffe2 and torch change from release to release."""
    prefixes = ("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at", "_ZN5torch", "_ZNK5torch", "_ZN6caffe2")
    assert [name for name in undefined_symbols() if name.startswith(prefixes)] == []


def test_available_and_why_not_agree():
    assert native.available() == (native.why_not() == "")


def test_without_the_library_the_reason_is_told_and_pytorch_takes_over(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "the native operators were not built")
    assert not native.available()
    with pytest.raises(NotImplementedError, match="flashmark.native cannot run: the native"):
        native.pack_tiles(torch.ones(1, 16, 16, dtype=torch.bool))
    visible = torch.rand(70, 70) < 0.5
    mask = masks.compile_mask(masks.dense(visible), 1, 1, 70, 70, device="cpu", block_size=32)
    assert torch.equal(mask.to_dense()[0, 0], visible)


def test_only_cpu_tensors_are_routed_to_it():
    assert native.preferred(torch.device("cpu")) == native.available()
    assert not native.preferred(torch.device("cuda"))
    assert not native.preferred(torch.device("meta"))
