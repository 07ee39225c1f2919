"""Layout of the package: public names, imports without a circle, calls and schemas."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import inspect
from pathlib import Path

import pytest

import flashmark
from flashmark.library import Operator

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {ROOT / "python" / "flashmark": "flashmark", ROOT / "kernels": "flashmark.kernels"}


def modules() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    found = {}
    for folder, package in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported_at_once(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports when it is imported."""
    found, open_nodes = set(), list(ast.parse(path.read_text()).body)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*home, *([base] if base else [])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            found |= inside & known.keys() or {base}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            open_nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            open_nodes += [x for x in ast.iter_child_nodes(node) if isinstance(x, ast.stmt)]
    return found & known.keys() - {name}


def test_no_circle_of_imports():
    known = modules()
    graph = {name: imported_at_once(name, path, known) for name, path in known.items()}
    assert "flashmark.masks" in graph["flashmark.arguments"]  # the list is not empty
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def public_api() -> str:
    lines = [f"__all__ = {', '.join(sorted(flashmark.__all__))}"]
    for name in sorted(flashmark.__all__):
        value = getattr(flashmark, name)
        if inspect.isfunction(value):
            lines.append(f"{name}{inspect.signature(value)}")
    lines.append(f"masks.__all__ = {', '.join(sorted(flashmark.masks.__all__))}")
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_those_on_record():
    """After an intended change write the new ones: python -m tests.test_layout"""
    assert public_api() == (ROOT / "tests" / "public_api.txt").read_text()


OPERATORS = {
    name: operator
    for name in ("block_sparse", "nystrom", "hybrid")
    for operator in vars(importlib.import_module(f"flashmark.{name}.operator")).values()
    if isinstance(operator, Operator)
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_schema_is_that_of_the_call(name):
    """Field by field; a mask is the tensors, integers and kind that its name begins."""
    operator = OPERATORS[name]
    fields = [field.name for field in dataclasses.fields(operator.call)]
    for backend, overload in operator.forward.items():
        schema = overload._schema
        assert schema.overload_name == backend
        names = [argument.name for argument in schema.arguments]
        assert [x for x in names if x not in ("mask_layout", "mask_kind")] == fields
        assert tuple(r.name for r in schema.returns) == operator.saved._fields
        backward = operator.backward[backend]._schema
        assert [a.name for a in backward.arguments][-len(names) :] == names
        assert tuple(r.name for r in backward.returns) == operator.grads._fields


if __name__ == "__main__":
    (ROOT / "tests" / "public_api.txt").write_text(public_api())
