"""Installation and imports, checked in fresh processes with a path of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(p.parent.name for p in ROOT.glob("kernels/*/__init__.py"))
SITE_PACKAGES = str(Path(torch.__file__).parents[1])
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_kernels = pytest.mark.skipif(
    not (KERNELS and HAS_TRITON), reason="needs Triton and a folder under kernels/"
)

# Blocks a package as if it were not installed.
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""

# where the package and its kernels are imported from
FILES = """
import importlib, flashmark
result = {{"flashmark": flashmark.__file__}}
for name in {}:
    result[name] = importlib.import_module("flashmark.kernels." + name).__file__
"""


def fresh_python(code: str, *, path: list[Path], cwd: Path, blocked: tuple[str, ...] = ()) -> dict:
    """Run `code` with `path` and torch's site-packages only; returns the dict it names `result`.

    -S leaves the .pth files of the environment unread: a development install cannot help.
    """
    search = [*map(str, path), SITE_PACKAGES]
    script = f"import json, sys\nsys.path[:0] = {search!r}\nBLOCKED = {set(blocked)!r}\n"
    script += BLOCK * bool(blocked) + code + "\nprint(json.dumps(result))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-build-isolation"],
        capture_output=True,
        text=True,
        env=os.environ | {"FLASHMARK_BUILD_EXT": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: building leaves files behind, and two tests may build at once."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "build")
    for name in ("python", "kernels", "csrc"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--wheel-dir", folder, checkout)
    (path,) = folder.glob("flashmark-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-index", "--target", target, wheel)
    return target


def test_wheel_holds_every_module_and_nothing_on_the_top_level_but_flashmark(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"flashmark"}
    expected = {
        str(p.relative_to(ROOT / "python")) for p in ROOT.glob("python/flashmark/**/*.py")
    } | {f"flashmark/{p.relative_to(ROOT)}" for p in ROOT.glob("kernels/*/*.py")}
    assert expected <= names
    assert "flashmark/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_wheel_imports_and_attends_with_torch_alone(installed, tmp_path):
    """No Triton, no numpy, no extension: the masks and the exact operator still work."""
    result = fresh_python(
        "import torch, flashmark\n"
        "x = torch.ones(1, 1, 4, 8)\n"
        "out = flashmark.block_sparse_attention(x, x, x, flashmark.masks.causal())\n"
        "result = {'file': flashmark.__file__, 'out': out.unique().tolist(),"
        " 'loaded': sorted(BLOCKED & set(sys.modules))}",
        path=[installed],
        cwd=tmp_path,
        blocked=("triton", "numpy", "matplotlib", "pandas", "tqdm"),
    )
    assert Path(result["file"]).is_relative_to(installed)
    assert result["out"] == [1.0]
    assert result["loaded"] == []


def test_import_loads_no_kernel_and_no_optional_package(installed, tmp_path):
    result = fresh_python(
        "import torch\nbefore = set(sys.modules)\nimport flashmark\n"
        "result = {'new': sorted(set(sys.modules) - before)}",
        path=[installed],
        cwd=tmp_path,
    )
    optional = ("triton", "numpy", "matplotlib", "pandas", "tqdm", "transformers")
    assert [name for name in result["new"] if name.partition(".")[0] in optional] == []
    assert [name for name in result["new"] if name.startswith("flashmark.kernels.")] == []


@needs_kernels
def test_kernels_import_from_the_installed_wheel(installed, tmp_path):
    files = fresh_python(FILES.format(KERNELS), path=[installed], cwd=tmp_path)
    assert set(files) == {"flashmark", *KERNELS}
    assert all(Path(file).is_relative_to(installed) for file in files.values())


def test_no_package_called_kernels_is_installed(installed, tmp_path):
    result = fresh_python(
        "import importlib.util\nresult = {'spec': importlib.util.find_spec('kernels') is None}",
        path=[installed],
        cwd=tmp_path,
    )
    assert result["spec"]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_editable_install_imports_from_the_sources(editable, tmp_path):
    checkout, target = editable
    code = f"import site\nsite.addsitedir({str(target)!r})\n"
    code += FILES.format(KERNELS if HAS_TRITON else [])
    files = fresh_python(code, path=[target], cwd=tmp_path)
    assert Path(files.pop("flashmark")).is_relative_to(checkout / "python/flashmark")
    assert files.keys() == (set(KERNELS) if HAS_TRITON else set())
    for name, file in files.items():
        assert Path(file).is_relative_to(checkout / "kernels" / name)


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory) -> tuple[Path, Path]:
    target = tmp_path_factory.mktemp("editable")
    pip("install", "--quiet", "--no-index", "--target", target, "--editable", checkout)
    return checkout, target
