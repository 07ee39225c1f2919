"""Random masks for hypothesis."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from flashmark import masks
from tests import helpers

BLOCK_SIZES = [16, 32, 64, 128, (16, 64), (128, 32), (32, 16), (64, 128)]


@dataclasses.dataclass
class RandomMask:
    batch: int
    heads: int
    q_len: int
    kv_len: int
    block_size: int | tuple[int, int]
    rule: helpers.Rule

    @property
    def blocks(self) -> tuple[int, int]:
        return self.block_size if isinstance(self.block_size, tuple) else (self.block_size,) * 2

    def compile(self) -> masks.BlockMask:
        return masks.compile_mask(
            self.rule.mask,
            self.batch,
            self.heads,
            self.q_len,
            self.kv_len,
            device="cpu",
            block_size=self.block_size,
        )

    def expected(self) -> torch.Tensor:
        return self.rule.dense(self.batch, self.heads, self.q_len, self.kv_len)


lengths = st.one_of(st.integers(1, 200), st.sampled_from([1, 16, 31, 33, 64, 127, 128, 129, 192]))


def random_bool(draw, shape, share=None):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.05, 0.5, 0.95])) if share is None else share
    return torch.rand(shape, generator=generator) < share


def random_ids(draw, batch, kv_len):
    """Document numbers in runs, sometimes revisited, some of them negative."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    change = torch.rand(batch, kv_len, generator=generator) < draw(st.sampled_from([0.02, 0.2]))
    ids = change.cumsum(1) % draw(st.sampled_from([3, 1000])) - draw(st.integers(0, 1))
    ids = ids.to(draw(st.sampled_from([torch.int64, torch.int32])))
    return ids[0] if batch == 1 and draw(st.booleans()) else ids


def leaf(draw, batch, heads, q_len, kv_len, sizes) -> helpers.Rule:
    near = st.integers(0, kv_len + 20)
    of_batch = st.lists(near, min_size=batch, max_size=batch).map(torch.tensor)
    shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    kind = draw(
        st.sampled_from(
            ["causal", "window", "window2", "prefix", "prefix_b", "pinned", "diagonal", "dilated"]
            + ["documents", "lengths", "padding", "blocks", "dense", "mod"]
        )
    )
    if kind == "causal":
        return helpers.causal()
    if kind == "window":
        return helpers.window(draw(st.integers(1, 220)))
    if kind == "window2":
        return helpers.window(draw(st.integers(1, 220)), draw(st.integers(0, 90)))
    if kind in ("prefix", "pinned"):
        return getattr(helpers, kind)(draw(near))
    if kind == "prefix_b":
        return draw(st.sampled_from([helpers.prefix, helpers.pinned]))(draw(of_batch))
    if kind == "diagonal":
        return helpers.diagonal()
    if kind == "dilated":
        return helpers.dilated(draw(st.integers(1, 70)))
    if kind == "documents":
        return helpers.documents(random_ids(draw, batch, kv_len))
    if kind == "lengths":
        return helpers.key_padding(draw(of_batch))
    if kind == "padding":
        return helpers.key_padding(random_bool(draw, (batch, kv_len)))
    if kind == "blocks":
        coarse = tuple(size * draw(st.integers(1, 3)) for size in sizes)
        tiles = random_bool(draw, (*shape, -(-q_len // coarse[0]), -(-kv_len // coarse[1])))
        return helpers.blocks(tiles, coarse)
    if kind == "dense":
        return helpers.dense(random_bool(draw, (*shape, q_len, kv_len)))
    which = draw(st.integers(0, 3))
    mods = {
        "q>=kv": lambda b, h, q, kv: q >= kv,
        "by sample": lambda b, h, q, kv: (q + kv) % (b + 2) == 0,
        "by head": lambda b, h, q, kv: kv <= q + 7 * h,
        "by both": lambda b, h, q, kv: (q - kv).abs() <= 5 * b + 30 * h,
    }
    return helpers.mask_mod(*list(mods.items())[which])


@st.composite
def random_masks(draw, max_leaves: int = 4) -> RandomMask:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    q_len, kv_len = draw(lengths), draw(lengths)
    if draw(st.booleans()):
        kv_len = q_len
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)

    def branch() -> helpers.Rule:
        rule = leaf(draw, batch, heads, q_len, kv_len, sizes)
        return ~rule if draw(st.integers(0, 3)) == 0 else rule

    rule = branch()
    for _ in range(draw(st.integers(0, max_leaves - 1))):
        other = branch()
        rule = rule & other if draw(st.booleans()) else rule | other
        rule = ~rule if draw(st.integers(0, 7)) == 0 else rule
    return RandomMask(batch, heads, q_len, kv_len, block_size, rule)
