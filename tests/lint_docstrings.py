"""Docstrings say first what a thing is or does: `make lint` runs this over the tree.

A first line that starts with What, Which, Where, How, Of, Those or The same names no thing.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

FOLDERS = ("python", "kernels", "csrc", "bench", "examples", "tests", "docs")
VAGUE = re.compile(r"(What|Which|Where|How|Of|Those|The same)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def vague_docstrings(source: str) -> list[tuple[int, str]]:
    """(line, first line) of each docstring that starts with one of the words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and VAGUE.match(text):
            found.append((node.body[0].lineno, text.splitlines()[0]))
    return sorted(found)


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    bad = 0
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        for line, text in vague_docstrings(path.read_text()):
            print(f"{path.relative_to(root)}:{line}: docstring names no thing: {text}")
            bad += 1
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
