"""Runner of the kernels under test: Triton's interpreter, the emulator, or a GPU."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the architecture, 80 or 90, that the emulator runs programs of; None: it does not run
EMULATED = int(os.environ["FLASHMARK_EMULATED"]) if "FLASHMARK_EMULATED" in os.environ else None
DEVICE = torch.device("cpu" if INTERPRETED or EMULATED else "cuda")
