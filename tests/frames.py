"""Frames of the package between a public function and the kernel of a backend."""

from __future__ import annotations

import sys
from pathlib import Path

import flashmark

MOST_FRAMES = 6
OURS = (Path(flashmark.__file__).parent, Path(__file__).resolve().parents[1] / "kernels")


def frames_of_ours() -> list[str]:
    """Functions of the package that are running now, the innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in OURS):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return found


class Reached(Exception):
    """Raised in the place of a kernel, with the frames that led there."""


def stop(*args, **kwargs):
    raise Reached(frames_of_ours())
