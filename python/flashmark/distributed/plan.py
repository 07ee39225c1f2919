"""Plans for context parallelism: each rank's tokens and the keys it needs, counted from a mask."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmark.distributed.local_mask import local_mask, ranges
from flashmark.masks import BlockMask
from flashmark.masks.arguments import integer

METHODS = ("auto", "contiguous", "zigzag", "lpt", "cut")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Tokens that one rank sends and receives: static indices.

    The keys that a rank attends to are in ascending order of position, its own among them.
    """

    send_index: Tensor  # local tokens to send, ordered by receiver
    send_counts: list[int]  # how many of them go to each rank
    receive_place: Tensor  # places of the received tokens, ordered by sender
    receive_counts: list[int]
    own_index: Tensor  # local tokens that this rank's own queries need
    own_place: Tensor

    @property
    def gathered(self) -> int:
        """Tokens after the exchange."""
        return self.receive_place.numel() + self.own_place.numel()

    def to(self, device: torch.device) -> Exchange:
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True, eq=False)
class ContextPlan:
    """A sequence shared out to ranks in blocks of `block` tokens, for one mask.

    Build it with `balance`. Every rank computes the same plan, without messages. A rank holds its
    tokens in ascending order of position.
    """

    mask: BlockMask  # of the whole sequence, on the CPU
    owner: Tensor  # (blocks,) the rank that holds each block
    ranks: int
    _local: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def block(self) -> int:
        return max(self.mask.block_q, self.mask.block_kv)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.mask.q_len

    def positions(self, rank: int) -> Tensor:
        """Positions in the whole sequence of the tokens that a rank holds, int64, ascending."""

        def compute() -> Tensor:
            return _tokens((self.owner == rank).nonzero().flatten(), self.block, self.length)

        return self.remember("positions", rank, torch.device("cpu"), compute)

    def segments(self, rank: int) -> list[tuple[int, int]]:
        """Positions of a rank's tokens as ranges (start, stop) that do not touch."""
        mine = torch.nn.functional.pad((self.owner == rank).int(), (1, 1)).diff()
        bounds = ((mine == 1).nonzero().flatten(), (mine == -1).nonzero().flatten())
        starts, stops = ((x * self.block).clamp(max=self.length).tolist() for x in bounds)
        return list(zip(starts, stops, strict=True))

    @functools.cached_property
    def tiles(self) -> Tensor:
        """(ranks,) visible tiles of each rank's queries, over the mask's samples and heads."""
        return torch.zeros(self.ranks, dtype=torch.long, device="cpu").index_add(
            0, self.owner, _tiles_of_blocks(self.mask)
        )

    @functools.cached_property
    def key_owner(self) -> Tensor:
        """(key tiles,) the rank that holds each key tile."""
        tiles = torch.arange(self.mask.kv_blocks, device="cpu") * self.mask.block_kv // self.block
        return self.owner[tiles]

    @functools.cached_property
    def needed(self) -> Tensor:
        """bool (ranks, key tiles): some query of the rank sees a key of the tile."""
        mask, lists = self.mask, self.mask.rows
        block_of_line = torch.arange(mask.q_blocks, device="cpu") * mask.block_q // self.block
        rank = self.owner[block_of_line].repeat(mask.batch * mask.heads)
        change = torch.zeros(self.ranks, mask.kv_blocks + 1, dtype=torch.int32, device="cpu")
        for offsets, entries, is_run in (
            (lists.run_offsets, lists.runs, True),
            (lists.partial_offsets, lists.partials, False),
        ):
            line, entry = ranges(offsets[:-1].long(), offsets.diff().long())
            first, length = entries[entry].long().T
            length = length if is_run else torch.ones_like(length)
            one = torch.ones_like(first, dtype=torch.int32)
            change.index_put_((rank[line], first), one, accumulate=True)
            change.index_put_((rank[line], first + length), -one, accumulate=True)
        return change.cumsum(1, dtype=torch.int32)[:, : mask.kv_blocks] > 0

    @functools.cached_property
    def key_tiles_received(self) -> Tensor:
        """(ranks,) key tiles that come from other ranks."""
        return (self.needed & ~self._own).sum(1)

    @functools.cached_property
    def tokens_sent(self) -> Tensor:
        """(ranks,) tokens whose key and value a rank sends, once for each receiver."""
        receivers = (self.needed & ~self._own).sum(0)
        sent = torch.zeros(self.ranks, dtype=torch.long, device="cpu")
        return sent.index_add(0, self.key_owner, receivers * self._tile_sizes)

    @functools.cached_property
    def tokens_received(self) -> Tensor:
        """(ranks,) tokens whose key and value a rank receives."""
        return ((self.needed & ~self._own) * self._tile_sizes).sum(1)

    def bytes_sent(self, rank: int, token_bytes: int) -> int:
        """Bytes of keys and values that a rank sends in a forward pass.

        `token_bytes` is what one token's key and value take, of all samples and heads. The
        backward pass sends gradients the other way: as many bytes as it received here.
        """
        return int(self.tokens_sent[rank]) * token_bytes

    def bytes_received(self, rank: int, token_bytes: int) -> int:
        """Bytes of keys and values that a rank receives in a forward pass."""
        return int(self.tokens_received[rank]) * token_bytes

    def bytes_all_gather(self, rank: int, token_bytes: int) -> int:
        """Bytes that it would receive if every rank were sent all keys and values."""
        return (self.length - self.positions(rank).numel()) * token_bytes

    @functools.cached_property
    def _own(self) -> Tensor:
        return self.key_owner == torch.arange(self.ranks, device="cpu")[:, None]

    @functools.cached_property
    def _tile_sizes(self) -> Tensor:
        """(key tiles,) tokens of each."""
        first = torch.arange(self.mask.kv_blocks, device="cpu") * self.mask.block_kv
        return (self.length - first).clamp(max=self.mask.block_kv)

    def gathered_positions(self, rank: int) -> Tensor:
        """Positions of the keys that a rank has after the exchange, int64, ascending."""
        tiles = self.needed[rank].nonzero().flatten()
        return _tokens(tiles, self.mask.block_kv, self.length)

    def exchange(self, rank: int, device: torch.device | str = "cpu") -> Exchange:
        """The exchange of one rank, cached."""
        device = torch.device(device)
        if device.type != "cpu":
            host = self.exchange(rank)
            return self.remember("exchange", rank, device, lambda: host.to(device))
        return self.remember("exchange", rank, device, lambda: self._exchange(rank))

    def local_mask(self, rank: int, device: torch.device | str = "cpu") -> BlockMask:
        """The mask of a rank's queries over its gathered keys, cached."""
        device = torch.device(device)
        if device.type != "cpu":
            host = self.local_mask(rank)
            return self.remember("mask", rank, device, lambda: host.to(device))
        return self.remember("mask", rank, device, lambda: self._local_mask(rank))

    def remember(self, what: str, rank: int, device: torch.device, compute: Callable[[], Any]):
        """The result of `compute`, cached."""
        if (what, rank, device) not in self._local:
            self._local[what, rank, device] = compute()
        return self._local[what, rank, device]

    def _local_mask(self, rank: int) -> BlockMask:
        block_of_line = (
            torch.arange(self.mask.q_blocks, device="cpu") * self.mask.block_q // self.block
        )
        lines = (self.owner[block_of_line] == rank).nonzero().flatten()
        columns = self.needed[rank].nonzero().flatten()
        lengths = self.positions(rank).numel(), self.exchange(rank).gathered
        return local_mask(self.mask, lines, columns, *lengths)

    def _exchange(self, rank: int) -> Exchange:
        mask, here = self.mask, self.positions(rank)
        place = self.gathered_positions(rank)
        is_mine = self.key_owner == rank

        def tokens(tiles: Tensor) -> Tensor:
            return _tokens(tiles, mask.block_kv, mask.kv_len)

        def counts(of_rank: Tensor, tiles: Tensor) -> list[int]:
            total = torch.zeros(self.ranks, dtype=torch.long, device="cpu")
            return total.index_add(0, of_rank, self._tile_sizes[tiles]).tolist()

        receiver, tile = (self.needed & is_mine).nonzero().T  # by receiver, then by position
        receiver, tile = receiver[receiver != rank], tile[receiver != rank]
        own = (self.needed[rank] & is_mine).nonzero().flatten()
        other = (self.needed[rank] & ~is_mine).nonzero().flatten()
        other = other[self.key_owner[other].argsort(stable=True)]
        return Exchange(
            send_index=torch.searchsorted(here, tokens(tile)),
            send_counts=counts(receiver, tile),
            receive_place=torch.searchsorted(place, tokens(other)),
            receive_counts=counts(self.key_owner[other], other),
            own_index=torch.searchsorted(here, tokens(own)),
            own_place=torch.searchsorted(place, tokens(own)),
        )


def balance(
    mask: BlockMask, ranks: int, *, method: str = "auto", exchange_cost: float = 8.0
) -> ContextPlan:
    """Share a sequence out to ranks so that they compute equally many tiles of the mask.

    Args:
        mask: of the whole sequence, from `compile_mask`, as many queries as keys.
        ranks: how many ranks share the sequence.
        method: "contiguous": equal segments in order, for masks of local reach. "zigzag": rank r
            holds segments r and 2 ranks - 1 - r of 2 ranks segments, which balances a causal mask.
            "lpt": blocks by falling tile count, each to the rank with the fewest tiles so far.
            These give every rank the same number of tokens, to a block. "cut": segments in order,
            cut where the tiles are equal; the numbers of tokens then differ. "auto": of the first
            three, the one whose busiest rank has the least tiles + exchange_cost * key tiles
            received.
        exchange_cost: receiving one key tile in units of computing one tile for all heads:
            bytes of a key tile / link bandwidth over FLOP of a tile / FLOP rate.

    Longest processing time first: Graham, "Bounds on multiprocessing timing anomalies" (1969).

    Raises:
        TypeError, ValueError: an argument out of range, or a mask that has no tile lists.
    """
    if not isinstance(mask, BlockMask):
        got = type(mask).__name__
        raise TypeError(f"mask: expected a BlockMask from compile_mask, got {got}")
    if mask.rows is None or mask.q_len != mask.kv_len:
        raise ValueError(f"mask: expected as many queries as keys, got {mask.shape}")
    integer("ranks", ranks, 1)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    mask = mask.to("cpu")
    if method != "auto":
        return ContextPlan(mask, _OWNERS[method](_tiles_of_blocks(mask), ranks), ranks)
    plans = [balance(mask, ranks, method=m) for m in ("contiguous", "zigzag", "lpt")]
    shared = max(1, mask.batch * mask.heads)

    def cost(plan: ContextPlan) -> float:
        return float((plan.tiles / shared + exchange_cost * plan.key_tiles_received).max())

    return min(plans, key=cost)


def _contiguous(weights: Tensor, ranks: int) -> Tensor:
    sizes = weights.new_tensor([len(part) for part in weights.tensor_split(ranks)])
    return torch.repeat_interleave(torch.arange(ranks, device="cpu"), sizes)


def _zigzag(weights: Tensor, ranks: int) -> Tensor:
    segment = _contiguous(weights, 2 * ranks)
    return torch.minimum(segment, 2 * ranks - 1 - segment)


def _longest_first(weights: Tensor, ranks: int) -> Tensor:
    owner = torch.empty_like(weights)
    most = -(-len(weights) // ranks)
    loads = [(0, 0, rank) for rank in range(ranks)]  # tiles, blocks, rank
    for block in weights.argsort(descending=True, stable=True).tolist():
        tiles, held, rank = heapq.heappop(loads)
        owner[block] = rank
        if held + 1 < most:
            heapq.heappush(loads, (tiles + int(weights[block]), held + 1, rank))
    return owner


def _cut(weights: Tensor, ranks: int) -> Tensor:
    middle = weights.cumsum(0) - 0.5 * weights
    share = max(1, int(weights.sum())) / ranks
    return (middle / share).long().clamp(max=ranks - 1)


_OWNERS = {"contiguous": _contiguous, "zigzag": _zigzag, "lpt": _longest_first, "cut": _cut}


def _tiles_of_blocks(mask: BlockMask) -> Tensor:
    """Visible tiles in each block of tokens, over the mask's samples and heads."""
    block = max(mask.block_q, mask.block_kv)
    line = torch.arange(mask.q_blocks, device="cpu") * mask.block_q // block
    blocks = -(-mask.q_len // block)
    return torch.zeros(blocks, dtype=torch.long, device="cpu").index_add(
        0, line, mask.rows.counts.sum((0, 1)).long()
    )


def _tokens(tiles: Tensor, size: int, length: int) -> Tensor:
    """All positions in the given tiles."""
    tokens = (tiles[:, None] * size + torch.arange(size, device="cpu")).flatten()
    return tokens[tokens < length]


def token_bytes(
    kv_heads: int,
    head_dim: int,
    v_dim: int | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of one token's keys and values, of all samples and heads."""
    return batch * kv_heads * (head_dim + (v_dim or head_dim)) * dtype.itemsize
