"""Targets, measurements and lower bounds on an H200: `python -m bench.targets CSV`."""

from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd

COPY, MATRIX = 4.3e12, 790e12  # measured on an H200: bytes a second, bfloat16 flops a second
OURS = "flashmark triton"


def targets(frame: pd.DataFrame) -> str:
    """A Markdown table: a line a target; "not measured" where the CSV has no such work."""
    ran = frame[frame.status == "ok"]
    lines = ["| work | target | measured | floor |", "|---|---|---|---|"]
    for line in [
        *_dense(ran), *_masks(ran), *_density(ran), *_building(ran), *_bias(ran), *_nystrom(ran)
    ]:  # fmt: skip
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _dense(ran):
    for dim in (64, 128):
        for direction, flop_factor in (("forward", 4), ("forward+backward", 14)):
            work = _only(ran, suite="masks", case="causal", dim=dim, direction=direction)
            measured, floor = "not measured", ""
            for n, some in work.groupby("n"):
                ours, peer = _ms(some, OURS), _ms(some, "sdpa")
                if math.isnan(ours):
                    continue
                row = some[some.contender == OURS].iloc[0]
                flops = flop_factor * row.batch * row.heads * n * n * dim * row.density
                measured = f"{peer / ours:.2f}x at N={n}, {row.tflops:.0f} TFLOP/s"
                floor = f"{flops / MATRIX * 1e3:.3g} of {ours:.3g} ms by products"
            yield f"dense causal, D={dim}, {direction}", ">= 1.0x SDPA", measured, floor


def _masks(ran):
    for direction, aim in (("forward", 1.5), ("forward+backward", 1.9)):
        work = _only(ran, suite="masks", direction=direction)
        for case, some in work[work.case != "causal"].groupby("case", sort=False):
            for dim, same in some.groupby("dim"):
                ratio = _ms(same, "flex compiled") / _ms(same, OURS)
                name = f"{case}, D={dim:.0f}, {direction}"
                yield name, f">= {aim}x FlexAttention", _times(ratio), ""


def _density(ran):
    for block in (128, 64):
        for direction in ("forward", "forward+backward"):
            work = _only(ran, suite=f"density {block}", contender=OURS, direction=direction)
            name = f"time by density, blocks of {block}, {direction}"
            if not len(work):
                yield name, "<= 1.10 of ideal", "not measured", ""
                continue
            full = work.loc[work.density.idxmax()]
            over = (work.p50_ms / full.p50_ms) / (work.density / full.density)
            rates = f"{work.tflops.min():.0f} to {work.tflops.max():.0f} TFLOP/s"
            yield name, "<= 1.10 of ideal", f"{over.max():.2f} of ideal, {rates}", ""


def _building(ran):
    for case, some in _only(ran, suite="mask_build").groupby("case", sort=False):
        some = some[some.n == some.n.max()]
        ratio = _ms(some, "create_block_mask") / _ms(some, "flashmark")
        name = f"building {case}, N={some.n.max()}"
        yield name, ">= 100x create_block_mask", _times(ratio), ""


def _bias(ran):
    for dim, some in _only(ran, suite="bias").groupby("dim"):
        more = _ms(some, "flashmark bias") / _ms(some, "flashmark plain") - 1
        measured = "not measured" if math.isnan(more) else f"{more:.0%} more"
        name = f"relative-bias gradient, D={dim:.0f}, forward+backward"
        yield name, "<= 15 % more time", measured, ""


def _nystrom(ran):
    work = _only(ran, suite="nystrom", case="Nyström M=64")
    at = _only(work, n=65536, direction="forward+backward")
    ours = _ms(at, OURS)
    name = "Nyström M=64, D=64, N=65536, forward+backward"
    yield name, ">= 20x exact causal", _times(_ms(at, "sdpa") / ours), ""
    yield name, ">= 2x fla", _times(_ms(at, "fla ") / ours), ""
    forward = _only(work, n=65536, direction="forward", contender=OURS)
    if len(forward):
        row = forward.iloc[0]
        floor = 4 * row.batch * row.heads * row.n * row.dim * 2 / COPY * 1e3
        measured = f"{row.p50_ms / floor:.2f}x the floor"
        yield "same, forward", "<= 2x its bytes", measured, f"{floor:.3g} ms by bytes"
    curve = _only(work, direction="forward", contender=OURS)
    curve = curve[curve.n >= 32768]
    slope = "not measured"
    if curve.n.nunique() > 1:
        slope = f"{np.polyfit(np.log(curve.n), np.log(curve.p50_ms), 1)[0]:.3f}"
    yield "Nyström, slope of time over N", "1.00 +- 0.05", slope, ""


def _only(frame: pd.DataFrame, **values) -> pd.DataFrame:
    for column, value in values.items():
        frame = frame[frame[column] == value] if column in frame else frame.iloc[:0]
    return frame


def _ms(frame: pd.DataFrame, contender: str) -> float:
    """The fastest median of the contenders whose names start so; nan where there is none."""
    if not len(frame):
        return math.nan
    return frame[frame.contender.str.startswith(contender)].p50_ms.min()


def _times(ratio: float) -> str:
    return "not measured" if math.isnan(ratio) else f"{ratio:.2f}x"


if __name__ == "__main__":
    print(targets(pd.read_csv(sys.argv[1])))
