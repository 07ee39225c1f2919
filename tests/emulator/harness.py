"""Small kernels around an instruction: every thread loads its inputs, and stores its outputs."""

from __future__ import annotations

import numpy as np

from .machine import Options, launch
from .parser import parse
from .program import Program

KINDS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
HEADER = """
.version 8.7
.target sm_90a
.address_size 64
"""


def run(body: str, *inputs: np.ndarray, outputs: list[str], shared: int = 0,
        arrays: tuple[np.ndarray, ...] = (), options: Options | None = None) -> list:  # fmt: skip
    """Outputs %y0, %y1, ... (NumPy types) of a body that finds its inputs in %x0, %x1, ...

    An element of an input is a thread's. %t is the thread; %s, %w, %d, %h and %p are free
    registers. The parameters g_0, g_1, ... point to `arrays`.
    """
    threads = len(inputs[0])
    inputs = [np.ascontiguousarray(x) for x in inputs]
    results = [np.zeros(threads, kind) for kind in outputs]
    own = [*inputs, *results]
    names = [f"k_{n}" for n in range(len(own))] + [f"g_{n}" for n in range(len(arrays))]
    params = ", ".join(f".param .u64 {name}" for name in names)
    declared, before, after = [], [], []
    for n, array in enumerate(own):
        name = f"%x{n}" if n < len(inputs) else f"%y{n - len(inputs)}"
        size = array.itemsize
        declared.append(f".reg .{KINDS[size]} {name};")
        address = f"ld.param.b64 %a, [k_{n}]; mad.wide.u32 %a, %t, {size}, %a;"
        if n < len(inputs):
            before.append(f"{address} ld.global.b{8 * size} {name}, [%a];")
        else:
            after.append(f"{address} st.global.b{8 * size} [%a], {name};")
    text = f"""{HEADER}
.extern .shared .align 128 .b8 space[];
.visible .entry k({params})
.reqntid {threads}
{{
.reg .b64 %a; .reg .b64 %d<8>; .reg .b32 %t; .reg .b32 %s<16>; .reg .b32 %w<64>;
.reg .b16 %h<8>; .reg .pred %p<8>;
{" ".join(declared)}
mov.u32 %t, %tid.x;
{" ".join(before)}
{body}
{" ".join(after)}
ret;
}}
"""
    program = Program(parse(text)["k"])
    ranges = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in (*own, *arrays)]
    pointers = np.array([start for start, _ in ranges], "u8").tobytes()
    launch(program, (1, 1, 1), threads, pointers, ranges, shared, options)
    return results


def one(body: str, *inputs: np.ndarray, output: str, **rest) -> np.ndarray:
    return run(body, *inputs, outputs=[output], **rest)[0]


def floats(n: int = 1024, seed: int = 0, dtype: str = "f4", wide: bool = True) -> np.ndarray:
    """Values of every size, with zeros, infinities, NaN and subnormals when `wide`."""
    draw = np.random.default_rng(seed)
    if not wide:
        return draw.standard_normal(n).astype(dtype)
    least = {"f2": -12, "f4": -120, "f8": -900}[dtype]
    values = draw.standard_normal(n) * 2.0 ** draw.integers(least, -least, n)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0 ** (least - 20), 1.0, -1.0]
    values[: len(special)] = special
    with np.errstate(over="ignore"):
        return draw.permutation(values.astype(dtype))


def integers(dtype: str, n: int = 1024, seed: int = 0) -> np.ndarray:
    info = np.iinfo(dtype)
    values = np.random.default_rng(seed).integers(info.min, info.max, n, dtype, endpoint=True)
    values[:4] = [0, 1, info.max, info.min]
    return values
