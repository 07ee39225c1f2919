"""wgmma with its descriptors and registers, tensor maps, mbarriers: sm_90a."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from .copies import MAP, swizzle
from .harness import integers, one, run
from .machine import Options
from .races import EmulationError
from .registers import RegisterState
from .test_warps import halves, words

T = np.arange(128, dtype="u4")


@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_swizzle_is_its_own_inverse_and_moves_16_bytes_at_a_time(width):
    at = np.arange(4096)
    moved = swizzle(at, width)
    np.testing.assert_array_equal(swizzle(moved, width), at)
    np.testing.assert_array_equal(moved // width, at // width)
    np.testing.assert_array_equal(moved % 16, at % 16)
    # bits 4 to 6 take bits 7 to 9, as in the ISA's figures: line 1 of 128 bytes swaps neighbours
    if width == 128:
        assert [int(x) for x in moved[128 : 128 + 128 : 16]] == [
            128 + 16 * (n ^ 1) for n in range(8)
        ]


def descriptor(start: int, leading: int, stride: int, width: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def lay_k_major(matrix: np.ndarray, width: int, start: int, memory: np.ndarray) -> tuple[int, int]:
    """Rows of `width` bytes, swizzled, 8 of them together. Returns leading and stride bytes.

    Without a swizzle: blocks of 8 rows x 16 bytes, those of a column of blocks side by side.
    """
    rows, depth = matrix.shape
    for r in range(rows):
        for k in range(depth):
            if width:
                at = swizzle(np.array(start + r * width + 2 * k), width)
            else:
                at = start + (k // 8 * (rows // 8) + r // 8) * 128 + r % 8 * 16 + k % 8 * 2
            memory[int(at) // 2] = matrix[r, k]
    return (0, 8 * width) if width else (rows // 8 * 128, 128)


def lay_n_major(matrix: np.ndarray, width: int, start: int, memory: np.ndarray) -> tuple[int, int]:
    """Columns of the transposed matrix in lines of `width` bytes, 8 values of k together."""
    rows, depth = matrix.shape
    across = width // 2
    for r in range(rows):
        for k in range(depth):
            block = r // across * (depth * width) + k * width
            at = swizzle(np.array(start + block + r % across * 2), width)
            memory[int(at) // 2] = matrix[r, k]
    return depth * width, 8 * width


def product(a: torch.Tensor, b: torch.Tensor, width: int, *, registers=False, transposed=False,
            edit=lambda text: text, shift=0, options=None):  # fmt: skip
    """A [64, 16] @ B [16, n] by wgmma, both from shared memory unless A is in `registers`."""
    n = b.shape[1]
    memory = np.zeros(8192, "u2")
    as_bits = lambda x: x.contiguous().view(torch.int16).numpy().view("u2")  # noqa: E731
    lay = lay_n_major if transposed else lay_k_major
    lead_a, stride_a = lay_k_major(as_bits(a), width, 0, memory)
    lead_b, stride_b = lay(as_bits(b.T), width, 8192, memory)
    first = descriptor(0, lead_a, stride_a, width)
    second = descriptor(8192 + shift, lead_b, stride_b, width)
    source = memory.view("u4").reshape(128, -1)
    fill = "mad.lo.u32 %s0, %t, 128, %s9; " + " ".join(
        f"setp.ne.u32 %p1, %x{j}, 0; @%p1 st.shared.b32 [%s0+{4 * j}], %x{j};"
        for j in range(source.shape[1])
    )
    d = ", ".join(f"%w{j}" for j in range(n // 2))
    kind, left = "bf16", "%d0"
    inputs = [np.ascontiguousarray(source[:, j]) for j in range(source.shape[1])]
    if registers:
        lane = np.arange(32)
        for r in range(4):
            rows = [16 * w + lane // 4 + 8 * (r % 2) for w in range(4)]
            column = 2 * (lane % 4) + 8 * (r // 2)
            parts = [words(torch.stack([a[row, column], a[row, column + 1]], -1)) for row in rows]
            inputs.append(np.concatenate(parts))
        left = "{" + ", ".join(f"%x{source.shape[1] + r}" for r in range(4)) + "}"
    flags = f"p, 1, 1, {'' if registers else '0, '}{int(transposed)}"
    zero = " ".join(f"mov.b32 %w{j}, 0;" for j in range(n // 2))
    out = " ".join(f"mov.b32 %y{j}, %w{j};" for j in range(n // 2))
    body = f"""mov.u32 %s9, space; {fill} {zero} mov.b64 %d0, {first}; mov.b64 %d1, {second};
        fence.proxy.async; bar.sync 0;
        {{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, {left}, %d1, {flags}; }}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {out}"""
    got = run(edit(body), *inputs, outputs=["f4"] * (n // 2), shared=16384, options=options)
    result = np.zeros((64, n))
    for j, register in enumerate(got):
        row = 16 * (T // 32) + T % 32 // 4 + 8 * (j // 2 % 2)
        result[row, 8 * (j // 4) + 2 * (T % 4) + j % 2] = register
    return result


def operands(n: int = 32):
    return halves(64, 16, seed=1).bfloat16(), halves(16, n, seed=2).bfloat16()


@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_wgmma(width, registers):
    a, b = operands()
    wanted = (a.double() @ b.double()).numpy()
    np.testing.assert_allclose(
        product(a, b, width, registers=registers), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("n, width", [(16, 32), (64, 32), (32, 64), (64, 64), (64, 128)])
def test_wgmma_with_b_transposed(n, width):
    a, b = operands(n)
    wanted = (a.double() @ b.double()).numpy()
    # A lies in lines of 128 bytes whatever B does
    np.testing.assert_allclose(product(a, b, width, transposed=True), wanted, rtol=1e-5, atol=1e-5)


FAULTS = {
    "no wgmma.fence": ("wgmma.fence.sync.aligned;", ""),
    "no proxy fence": ("fence.proxy.async;", ""),
    "race: read after write": ("bar.sync 0;", ""),
    "register of a product in flight": ("wgmma.wait_group.sync.aligned 0;", ""),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_around_wgmma(kind):
    a, b = operands()
    with pytest.raises(EmulationError, match=rf"{kind}.*warp \d.*wgmma.mma_async"):
        product(a, b, 128, edit=lambda text: text.replace(*FAULTS[kind]))


def test_a_descriptor_32_bytes_off():
    a, b = operands()
    unchecked = Options(check_races=False)
    wrong = product(a, b, 128, shift=32, options=unchecked)
    assert not np.abs(wrong - (a.double() @ b.double()).numpy()).max() < 0.1
    with pytest.raises(
        EmulationError, match="uninitialised shared memory.*warp 0.*wgmma.mma_async"
    ):
        product(a, b, 128, shift=32)


def test_a_write_into_what_a_product_reads():
    a, b = operands()

    def edit(text):
        return text.replace("wgmma.commit_group", "st.shared.b32 [%s0], 0; wgmma.commit_group")

    with pytest.raises(
        EmulationError,
        match="race: write after read in flight.*st.shared.*the products of warp 0's group",
    ):
        product(a, b, 128, edit=edit)


def test_warps_in_two_states_of_their_registers_each_move_once():
    state = object.__new__(RegisterState)
    state.machine, state.products, state.state = None, [None], np.array([0, 1, 0])
    state.moves = SimpleNamespace(through=lambda number, block: (number + 1, []))
    state.enter(None, None)
    state.enter(None, np.array([1, 2]))
    assert state.state.tolist() == [1, 3, 2]


# tensor maps and mbarriers


def tensor_map(tensor: np.ndarray, box: tuple[int, int], width: int) -> np.ndarray:
    entry = np.zeros(1, MAP)
    rows, columns = tensor.shape
    entry["address"], entry["rank"], entry["element"] = tensor.ctypes.data, 2, 2
    entry["dims"][0, :2] = columns, rows
    entry["strides"][0, 0] = columns * 4
    entry["box"][0, :2] = box[1], box[0]
    entry["steps"][0, :2] = 1
    entry["swizzle"] = {0: 0, 32: 1, 64: 2, 128: 3}[width]
    return entry.view("u1")


COPY = """mov.u32 %s9, space; setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%s9+2048], 1; fence.proxy.async; bar.sync 0;
    ld.param.b64 %d0, [g_0];
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s9+2048], BYTES;
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [%s9], [%d0, {COLUMN, ROW}], [%s9+2048];
    { .reg .pred complete;
    waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%s9+2048], PARITY;
      @!complete bra.uni waitLoop; }
    mad.lo.u32 %s0, %t, 4, %s9; ld.shared.b32 %y0, [%s0];"""


def copied(row: int, column: int, *, width: int = 64, parity: int = 0, nbytes: int = 512,
           edit=lambda text: text, options=None):  # fmt: skip
    """A box of 8 x 16 words out of 20 x 24, one word to a thread."""
    tensor = np.arange(480, dtype="u4").reshape(20, 24)
    entry = np.zeros(128 * 2, "u1")
    start = -entry.ctypes.data % 64
    entry[start : start + 128] = tensor_map(tensor, (8, 16), width)
    entry = entry[start : start + 128]
    body = COPY.replace("ROW", str(row)).replace("COLUMN", str(column))
    body = edit(body.replace("PARITY", str(parity)).replace("BYTES", str(nbytes)))
    got = one(body, T, output="u4", shared=2304, arrays=(entry, tensor), options=options)
    return got, tensor


@pytest.mark.parametrize("landing", ["early", "late", "drawn"])
@pytest.mark.parametrize("row, column", [(0, 0), (3, 5), (15, 20), (-2, -4)])
def test_a_box_of_a_tensor(row, column, landing):
    """Elements outside are zeros, and still count as bytes that arrived."""
    got, tensor = copied(row, column, options=Options(landing=landing))
    wide = np.zeros((60, 70), "u4")
    wide[10:30, 10:34] = tensor
    box = wide[10 + row : 18 + row, 10 + column : 26 + column]
    shown = np.zeros(128, "u4")
    shown[swizzle(np.arange(128) * 4, 64) // 4] = box.reshape(-1)
    np.testing.assert_array_equal(got, shown)


def test_waiting_for_the_wrong_phase_or_for_too_many_bytes():
    with pytest.raises(EmulationError, match="race: read after write|uninitialised"):
        copied(0, 0, parity=1, options=Options(landing="late"))
    with pytest.raises(EmulationError, match="deadlock.*mbarrier.try_wait"):
        copied(0, 0, nbytes=1024)


def test_an_mbarrier_is_initialised_before_it_is_used():
    def edit(text):
        return text.replace("@%p0 mbarrier.init", "@%p1 mbarrier.init").replace(
            "setp.eq.u32 %p0, %t, 0;", "setp.eq.u32 %p0, %t, 0; setp.eq.u32 %p1, %t, 200;"
        )

    with pytest.raises(EmulationError, match="mbarrier used before its initialisation"):
        copied(0, 0, edit=edit)


def test_unordered_initialisation_is_a_race():
    def edit(text):
        moved = text.replace("bar.sync 0;", "").replace(
            "setp.eq.u32 %p0, %t, 0;", "setp.eq.u32 %p0, %t, 0; setp.eq.u32 %p1, %t, 32;"
        )
        return moved.replace("@%p0 mbarrier.arrive", "@%p1 mbarrier.arrive")

    with pytest.raises(EmulationError, match="race: read after write.*mbarrier"):
        copied(0, 0, edit=edit)


def test_what_threads_wrote_and_a_copy_writes_needs_a_proxy_fence():
    """The barrier, by its initialisation; words where the box lands."""
    with pytest.raises(EmulationError, match="no proxy fence: async write.*mbarrier.init"):
        copied(0, 0, edit=lambda text: text.replace("fence.proxy.async;", ""))

    def late(text):
        store = "bar.sync 0; mad.lo.u32 %s0, %t, 4, %s9; st.shared.b32 [%s0], 7; bar.sync 0;"
        return text.replace("bar.sync 0;", store)

    with pytest.raises(EmulationError, match="no proxy fence: async write.*st.shared"):
        copied(0, 0, edit=late)
    copied(
        0, 0, edit=lambda text: late(text).replace("bar.sync 0;", "fence.proxy.async; bar.sync 0;")
    )


def test_sixteen_byte_copies_and_groups():
    """cp.async: the newest group may still be under way, and zeros fill what is not read."""
    x = integers("u4", 512)
    body = """mov.u32 %s9, space; mad.lo.u32 %s0, %t, 16, %s9; ld.param.b64 %d0, [g_0];
              mul.wide.u32 %d1, %t, 16;
        add.s64 %d0, %d0, %d1; and.b32 %s1, %t, 1; shl.b32 %s1, %s1, 4;
        cp.async.cg.shared.global [%s0], [%d0], 0x10, %s1; cp.async.commit_group;
        cp.async.cg.shared.global [%s0+2048], [%d0], 16; cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.v4.b32 {%y0, %y1, %y2, %y3}, [%s0]; cp.async.wait_group 0;"""
    rows = x.reshape(128, 4)
    inputs = [np.ascontiguousarray(rows[:, n]) for n in range(4)]
    for landing in ("early", "late", "drawn"):
        options = Options(landing=landing)
        got = run(body, *inputs, outputs=["u4"] * 4, shared=4096, arrays=(x,), options=options)
        for n in range(4):
            np.testing.assert_array_equal(got[n], np.where(T & 1, rows[:, n], 0))
    one_more = body.replace("wait_group 1", "wait_group 2")
    newest = body.replace("[%s0]; cp.async.wait", "[%s0+2048]; cp.async.wait")
    for bad in (one_more, newest):
        with pytest.raises(EmulationError, match="race: read after write in flight.*cp.async"):
            run(bad, *inputs, outputs=["u4"] * 4, shared=4096, arrays=(x,))
