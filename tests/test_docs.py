"""Every Python example that a user may copy runs: in the README, in docs, in docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import flashmark

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WITH_EXAMPLES = [page for page in PAGES if BLOCK.search(page.read_text())]


def modules_with_examples() -> list[str]:
    """Names of the modules whose source has a doctest; none is imported."""
    package = Path(flashmark.__file__).parent
    sources = [path for path in sorted(package.rglob("*.py")) if ">>> " in path.read_text()]
    parts = [path.relative_to(package.parent).with_suffix("").parts for path in sources]
    return [".".join(part).removesuffix(".__init__") for part in parts]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_run_from_top_to_bottom(page, capsys):
    torch.manual_seed(0)
    names: dict = {}
    for block in BLOCK.findall(page.read_text()):
        if "transformers" in block:
            pytest.importorskip("transformers")
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_print_what_they_say(name):
    torch.manual_seed(0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.attempted and not result.failed
