"""Calls that torch.compile leaves out of its graphs. Imported while it traces: the decorator
imports Dynamo."""

from __future__ import annotations

import torch

from flashmark import transforms


@torch.compiler.disable(
    reason="an operator under torch.func or in forward mode runs between two graphs"
)
def run(operator, call, backend: str):
    """`flashmark.transforms.run`."""
    saved = transforms.run(operator, call, backend)
    return operator.run(call, backend) if saved is None else saved
