"""Before a build: the README becomes the home page, and the gallery draws its masks."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))

from gallery import draw_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("bench/results", "examples/results")  # pictures that README and pages refer to


def on_files(files, config):
    drawn = draw_all(ROOT / "build" / "gallery")
    pictures = {f"gallery/{path.name}": path for path in drawn}
    for folder in SHOWN:
        pictures |= {f"{folder}/{path.name}": path for path in (ROOT / folder).glob("*.png")}
    for uri, path in pictures.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    home = (ROOT / "README.md").read_text().replace("](docs/", "](")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        home = home.replace(f"[{name}]({name})", name)
    files.append(File.generated(config, "index.md", content=home))
    return files
