"""A table of our kernels in the emulator: kernel x architecture, error beside PyTorch's own.

`python -m tests.emulator.table [sm_80] [sm_90] [--only TEXT] [--csv FILE]`. Error is the largest
relative error of the outputs and gradients of a call against float64, PyTorch's that of the same
formula in plain PyTorch and the same dtype. Seconds are of the emulation of all its launches.

Before 3.7, Triton puts no fence between cp.async and wgmma, which the ISA asks for: those are
counted in the last column, and end nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable

import torch
import triton

from flashmark import masks
from flashmark.kernels.block_sparse import configs
from tests.helpers import relative_error
from tests.hybrid.cases import Case as HybridCase
from tests.interpreter.attention_cases import Call, Case
from tests.nystrom.cases import Case as NystromCase

from .device import Emulated, emulating
from .machine import Options
from .races import EmulationError

NOTED = ("no proxy fence: async read",) if triton.__version__ < "3.7" else ()
WINDOW = masks.causal() & masks.sliding_window(90)
PLAIN = Case(mask=WINDOW, kv_heads=1, q_len=150, dim=64, block=64, dtype=torch.bfloat16)
EXACT = {
    "causal": dataclasses.replace(PLAIN, mask=masks.causal()),
    "window": PLAIN,
    "window D=128": dataclasses.replace(PLAIN, dim=128),
    "float32": dataclasses.replace(PLAIN, dtype=torch.float32, q_len=70, dim=32, block=32),
    "dropout": dataclasses.replace(PLAIN, dropout_p=0.2),
    "dense bias": dataclasses.replace(PLAIN, bias=(1, 2, 150, 150)),
    "relative bias": dataclasses.replace(PLAIN, bias=(2, 299)),
    "sinks, softcap": dataclasses.replace(PLAIN, sinks=True, softcap=2.0),
    "decode": Case(mask=masks.causal(), q_len=2, kv_len=300, rows=300, kv_heads=1, dim=64,
                   query_offset=(255,), dtype=torch.bfloat16),
}  # fmt: skip
NYSTROM = {
    "nystrom": NystromCase(150, 64, dim=64, v_dim=64),
    "nystrom decay": NystromCase(150, 16, decay=0.3, state=True),
    "nystrom mass": NystromCase(100, 16, normalize="mass"),
    "nystrom bidirectional": NystromCase(100, 16, is_causal=False),
}
HYBRID = {
    "hybrid slots": HybridCase(50, 16, 16, group=2),
    "hybrid gate": HybridCase(30, 10, 5, "gate", group=2),
    "hybrid mass": HybridCase(50, 16, 8, "mass", group=2),
}


@dataclasses.dataclass
class Row:
    """One kernel of one call."""

    call: str
    arch: int
    kernel: str
    launches: int = 0
    seconds: float = 0.0
    instructions: int = 0
    error: float = float("nan")
    pytorch: float = float("nan")
    faults: str = "0"
    noted: int = 0


def exact(case: Case) -> tuple[float, float]:
    """(largest error, PyTorch's) of the outputs and gradients of block-sparse attention."""
    call = Call(case, torch.device("cpu"))
    wanted = call.reference()
    out, lse = call.forward()
    got = {"out": out, "lse": lse}
    if case.query_offset is None:
        for deterministic in (True, False):
            for name, tensor in call.backward(out, lse, deterministic).items():
                got[f"{name}, {deterministic}"] = tensor
    plain = call.reference(case.dtype)
    errors = [relative_error(x, wanted[n.split(",")[0]]) for n, x in got.items()]
    return max(errors), max(
        relative_error(plain[n.split(",")[0]], wanted[n.split(",")[0]]) for n in got
    )


def form(name: str) -> tuple[float, float]:
    call = Call(PLAIN, torch.device("cpu"))
    wanted = call.reference()
    with configs.using(forward=configs.hopper(name, 64, (64, 64))):
        got = dict(zip(("out", "lse"), call.forward(), strict=True))
    plain = call.reference(PLAIN.dtype)
    return (max(relative_error(got[n], wanted[n]) for n in got),
            max(relative_error(plain[n], wanted[n]) for n in got))  # fmt: skip


def operator(function, case, dtype=torch.bfloat16) -> tuple[float, float]:
    """Errors of an operator with arguments of its own, by autograd."""

    def results(arguments, **rest):
        given = {n: x for n, x in arguments.items()}
        out = function(**given, **rest)
        leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        return [out, *torch.autograd.grad(out.double().square().sum(), leaves)]

    def cast(arguments, target):
        def one(x):
            if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
                return x
            return x.detach().to(target).requires_grad_()

        return {n: one(x) for n, x in arguments.items()}

    arguments = {n: x for n, x in case.arguments(dtype).items() if n != "state"}
    got = results(arguments, backend="triton")
    wanted = results(cast(arguments, torch.float64), backend="eager")
    plain = results(
        cast(arguments, torch.float32 if dtype == torch.float32 else dtype), backend="eager"
    )
    pairs = list(zip(got, plain, wanted, strict=True))
    return (max(relative_error(g, w) for g, _, w in pairs),
            max(relative_error(p, w) for _, p, w in pairs))  # fmt: skip


def calls(arch: int) -> dict[str, Callable[[], tuple[float, float]]]:
    from flashmark import hybrid_attention, nystrom_attention

    found = {f"exact {n}": lambda c=c: exact(c) for n, c in EXACT.items()}
    if arch == 90:
        found |= {f"exact {n}": lambda n=n: form(n) for n in ("gluon",)}
    found |= {n: lambda c=c: operator(nystrom_attention, c) for n, c in NYSTROM.items()}
    return found | {n: lambda c=c: operator(hybrid_attention, c) for n, c in HYBRID.items()}


def rows_of(name: str, arch: int, device: Emulated, errors, faults: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for launch in device.launches:
        row = rows.setdefault(launch.kernel, Row(name, arch, launch.kernel))
        row.launches += 1
        row.seconds += launch.seconds
        row.instructions += launch.instructions().total()
        row.error, row.pytorch = errors
        row.faults = faults
        row.noted += launch.noted.total()
    return list(rows.values()) or [Row(name, arch, "-", faults=faults)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=["sm_80", "sm_90"])
    parser.add_argument("--only", default="", help="calls whose name holds this text")
    parser.add_argument("--csv", help="write the table there as well")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}\n")
    titles = "call arch kernel launches seconds instructions error pytorch faults noted".split()
    print("|", " | ".join(titles), "|\n" + "|---" * len(titles) + "|")
    table, failed = [], False
    for arch in (int(t.removeprefix("sm_")) for t in options.targets):
        for name, run in calls(arch).items():
            if options.only not in name:
                continue
            errors, faults = (float("nan"), float("nan")), "0"
            with emulating(arch, Options(only_noted=NOTED)) as device:
                try:
                    errors = run()
                except EmulationError as error:
                    faults, failed = str(error).splitlines()[0], True
            for row in rows_of(name, arch, device, errors, faults):
                table.append(row)
                print(f"| {name} | sm_{arch} | {row.kernel} | {row.launches} | {row.seconds:.2f} "
                      f"| {row.instructions} | {row.error:.1e} | {row.pytorch:.1e} | {row.faults} | {row.noted} |", flush=True)  # fmt: skip # noqa: E501
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["triton", *titles])
            writer.writerows([triton.__version__, *dataclasses.astuple(row)] for row in table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
