"""Defining an operator once for all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from flashmark.autograd import autocast_is_on

_LIBRARY = torch.library.Library("flashmark", "FRAGMENT")


def _without_autocast(implementation: Callable) -> Callable:
    """Inside an operator dtypes are chosen already: autocast must not touch its products."""

    @functools.wraps(implementation)
    def run(first: torch.Tensor, *args):
        device = first.device.type
        if not autocast_is_on(device):
            return implementation(first, *args)
        with torch.autocast(device, enabled=False):
            return implementation(first, *args)

    return run


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define `flashmark::<schema>`: one implementation for every device, and a fake one."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmark::{name}", fake, lib=_LIBRARY)
