"""Causal Nyström cut into chunks: what the forward and the backward share.

A chunk is `chunk` tokens after the time of its incoming state (L0, R0). In chunk-relative time,
token j = 1, 2, ... has scores u_lj = landmark_query_l . key_j + decay_l j, and decay is gone from
every other formula. Shapes: B batch, H key-value heads, nc chunks of a block, C tokens of a chunk,
M landmarks, Z = B H nc matrices of a batched product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import readable
from flashmark.nystrom.call import Call

NEG_INF = float("-inf")
CHUNK = 64
BLOCK_ELEMENTS = 1 << 17  # entries of a (B, H, nc, C, M) temporary a thread: a few fit its cache
RISE = {torch.float32: 64.0, torch.float64: 600.0}  # largest exponent above the reference
DECAY_PER_CHUNK = 32.0  # leaves half of the float32 range to the scores


class Sequence(NamedTuple):
    """Chunks [begin, end) of one sequence, and the rows of the state tensors that belong to it."""

    rows: slice
    begin: int
    end: int


class Block(NamedTuple):
    """Keys and values of consecutive chunks; what a mask hides is zero, and -inf in `scores`."""

    key: Tensor  # (B, H, nc * C, D)
    value: Tensor  # (Z, C, Dv)
    scores: Tensor  # (B, H, nc, C, M): u
    keep: Tensor | None  # (B | 1, nc, C) bool


class Sums(NamedTuple):
    """A block's chunks, each on its own, without incoming state."""

    top: Tensor  # (B, H, nc, M): largest u
    L: Tensor  # (B, H, nc, M): logsumexp of u
    R: Tensor  # (B, H, nc, M, Dv): mean of the values


class Running(NamedTuple):
    """Normalisers of all rows of a block: exp(L_l(i) - ref_l) = cum_li, P_lj = exp(u_lj - ref_l).

    `ref` is L0, or the first kept key's score where L0 = -inf: never anything that a later token
    can change. Where a score rises more than RISE above it, rows from there on are computed token
    by token instead (`Steep`).
    """

    P: Tensor  # (Z, C, M)
    cum: Tensor  # (Z, C, M), inf where no key is visible
    ref: Tensor  # (Z, 1, M)
    seen: Tensor  # (Z, 1, M): exp(L0 - ref), 1 or 0
    steep: Steep | None


class Steep(NamedTuple):
    """Chunks that the fast path cannot hold."""

    index: Tensor  # (n,): rows of Z
    slow: Tensor  # (n, C) bool: rows at or after the rise
    scores: Tensor  # (n, C, M)
    L: Tensor  # (n, C, M): exact running normaliser
    L0: Tensor  # (n, M)
    R0: Tensor  # (n, M, Dv)
    value: Tensor  # (n, C, Dv)


class Setup:
    """The inputs of one call that have nothing to do with time, in computing precision."""

    def __init__(self, call: Call):
        query, key = call.query, call.key
        self.call = call
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.device = query.device
        self.batch, self.heads, self.tokens = key.shape[:3]
        self.group = query.shape[1] // self.heads
        self.marks, self.dim_v = call.core.shape[-1], call.value.shape[-1]
        self.mass = call.mass
        lq, lk = (batched(x.to(self.dtype)) for x in (call.landmark_queries, call.landmark_keys))
        self.lq, self.lk = lq * call.scale, lk * call.scale  # (B | 1, H, M, D)
        self.half = 0.5 * (self.lq * lk).sum(-1)  # (B | 1, H, M)
        self.core = batched(call.core.to(self.dtype))

    def incoming(self) -> tuple[Tensor, Tensor]:
        """The state a call starts from, nothing held when None; R is 0 where L = -inf."""
        L0, R0 = self.call.L0, self.call.R0
        shape = self.call.rows, self.heads, self.marks
        if L0 is None or R0 is None:
            L0 = torch.full(shape, NEG_INF, dtype=self.dtype, device=self.device)
            R0 = torch.zeros(*shape, self.dim_v, dtype=self.dtype, device=self.device)
        L0, R0 = L0.to(self.dtype), R0.to(self.dtype)
        nothing = L0 == NEG_INF
        if readable(nothing) and not bool(nothing.any()):  # saves a copy; a GPU would wait
            return L0, R0
        return L0, R0.masked_fill(nothing.unsqueeze(-1), 0.0)

    def mats(self, x: Tensor, rows: int) -> Tensor:
        """(B, H, n * rows, *) -> (B * H * n, rows, *)"""
        return x.reshape(-1, rows, x.shape[-1])


def batched(x: Tensor) -> Tensor:
    """(H, ., .) or (B, H, ., .) -> (B | 1, H, ., .)"""
    return x if x.dim() == 4 else x.unsqueeze(0)


class Chunks(Setup):
    """A causal call: where chunks and sequences begin and end, and the tokens of each."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.chunk = min(CHUNK if self.marks <= 64 else 2 * CHUNK, max(1, self.tokens))
        if call.cu_seqlens is not None:  # a sequence is padded to whole chunks
            while self.chunk > 16 and self.chunk > 2 * self.tokens // call.rows:
                self.chunk //= 2
        self.decay = None
        if call.decay is not None:
            self.decay = call.decay.to(self.dtype)
            while self.chunk > 16 and float(self.decay.amax()) * self.chunk > DECAY_PER_CHUNK:
                self.chunk //= 2
        self._lay_out(call.cu_seqlens, call.key_mask)
        self.query, self.key, self.value = map(self.spread, (call.query, call.key, call.value))
        self.L0, self.R0 = self.incoming()
        width = self.batch * self.heads * self.chunk * self.marks * self.group
        size = BLOCK_ELEMENTS * (torch.get_num_threads() if self.device.type == "cpu" else 64)
        step = max(1, size // max(1, width))
        self.blocks = [(c, min(c + step, self.chunks)) for c in range(0, self.chunks, step)]
        self.steps = torch.arange(1, self.chunk + 1, device=self.device, dtype=self.dtype)[:, None]
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64

    def _lay_out(self, cu_seqlens, key_mask):
        chunk, self.places = self.chunk, None
        if cu_seqlens is None:
            self.chunks = -(-self.tokens // chunk)
            self.sequences = [Sequence(slice(None), 0, self.chunks)]
            counts = [self.tokens]
        else:
            bounds = cu_seqlens.tolist()
            counts = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
            self.sequences, self.chunks, offsets = [], 0, []
            for s, count in enumerate(counts):
                begin, self.chunks = self.chunks, self.chunks - (-count // chunk)
                self.sequences.append(Sequence(slice(s, s + 1), begin, self.chunks))
                offsets.append(begin * chunk - bounds[s])
            offset = torch.tensor(offsets).repeat_interleave(torch.tensor(counts))
            self.places = (torch.arange(self.tokens) + offset).to(self.device)
        lengths = torch.full((self.chunks,), chunk)
        for sequence, count in zip(self.sequences, counts, strict=True):
            if sequence.end > sequence.begin:
                rest = count - (sequence.end - sequence.begin - 1) * chunk
                lengths[sequence.end - 1] = rest
        self.lengths = lengths.to(self.device)

        self.keep = None
        if key_mask is not None or self.chunks * chunk != self.tokens:
            keep = torch.zeros(1, self.chunks * chunk, dtype=torch.bool, device=self.device)
            where = slice(self.tokens) if self.places is None else self.places
            if key_mask is None:
                keep[:, where] = True
            else:
                keep = keep.repeat(key_mask.shape[0], 1)
                keep[:, where] = key_mask
            self.keep = keep.unflatten(1, (self.chunks, chunk))

    def spread(self, x: Tensor) -> Tensor:
        """Packed tokens to their places in chunks, zero elsewhere; unpacked input as it is."""
        if self.places is None:
            return x
        padded = x.new_zeros(*x.shape[:2], self.chunks * self.chunk, x.shape[-1])
        padded[:, :, self.places] = x
        return padded

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return x[:, :, : self.tokens] if self.places is None else x[:, :, self.places]

    def empty(self, like: Tensor) -> Tensor:
        """A row for every place in padded chunks of something shaped like `like`."""
        shape = (*like.shape[:2], self.chunks * self.chunk, like.shape[-1])
        return torch.empty(shape, dtype=like.dtype, device=self.device)

    def tokens_of(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """Tokens of chunks [c0, c1), zero past the end: (B, *, nc * C, *), computing precision."""
        x = x[:, :, c0 * self.chunk : c1 * self.chunk].to(self.dtype)
        missing = (c1 - c0) * self.chunk - x.shape[2]
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x

    def rows_of(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """Query-side rows, the group's heads under each other: (B, H, nc * group * C, *)."""
        x = self.tokens_of(x, c0, c1)
        if self.group > 1:
            x = x.unflatten(1, (self.heads, self.group)).unflatten(3, (c1 - c0, self.chunk))
            x = x.transpose(2, 3).flatten(2, 4)
        return x

    def put_rows(self, out: Tensor, rows: Tensor, c0: int, c1: int) -> None:
        """The inverse of `rows_of`, into a tensor from `empty`."""
        rows = rows.view(self.batch, self.heads, c1 - c0, self.group, self.chunk, -1)
        rows = rows.transpose(2, 3).reshape(self.batch, self.heads * self.group, -1, rows.shape[-1])
        out[:, :, c0 * self.chunk : c1 * self.chunk] = rows

    def block(self, c0: int, c1: int) -> Block:
        key, value = self.tokens_of(self.key, c0, c1), self.tokens_of(self.value, c0, c1)
        keep = None if self.keep is None else self.keep[:, c0:c1]
        if keep is not None:
            hidden = ~keep.reshape(keep.shape[0], 1, -1, 1)
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        scores = key @ self.lq.mT
        if keep is not None:
            scores = scores.masked_fill_(hidden, NEG_INF)
        scores = scores.unflatten(2, (c1 - c0, self.chunk))
        if self.decay is not None:
            scores += self.decay[:, None, None, :] * self.steps
        return Block(key, self.mats(value, self.chunk), scores, keep)

    def sums(self, block: Block) -> Sums:
        top = block.scores.amax(-2)
        safe = top.masked_fill(top == NEG_INF, 0.0).unsqueeze(-2)
        E = torch.exp(block.scores - safe)
        total = E.sum(-2, keepdim=True)
        R = torch.bmm(self.mats(E.flatten(2, 3), self.chunk).mT, block.value)
        R = R.view(*top.shape, -1) / total.masked_fill(total == 0, 1.0).mT
        return Sums(top, (safe + torch.log(total)).squeeze(-2), R)

    def scan(self, c0: int, c1: int, sums: Sums, carry) -> tuple[Tensor, Tensor, object]:
        """States at each chunk's start, (B, H, nc, M) and (B, H, nc, M, Dv), and the next carry.

        `carry` is (L, R, L_end, R_end) of the block before, None at the start; the last two are the
        final states. L is summed in float64: a thousand roundings of a growing logarithm show.
        """
        if carry is None:
            carry = None, None, self.L0.clone(), self.R0.clone()
        L, R, L_end, R_end = carry
        starts_L, starts_R = torch.empty_like(sums.L), torch.empty_like(sums.R)
        for rows, begin, end in self.sequences:
            p0, p1 = max(begin, c0), min(end, c1)
            if p0 >= p1:
                continue
            if p0 == begin:
                L, R = self.L0[rows].to(self.wide), self.R0[rows]
            own = sums.L[:, :, p0 - c0 : p1 - c0].to(self.wide)
            shift = 0.0
            if self.decay is not None:
                time = self.lengths[p0:p1].cumsum(0)
                time = torch.cat([time.new_zeros(1), time]).to(self.wide)
                shift = self.decay.to(self.wide)[:, None] * time[:, None]  # (H, n + 1, M)
                own = own + shift[:, :-1]
            path = torch.logcumsumexp(torch.cat([L.unsqueeze(2), own], 2), 2)
            weight = torch.exp(own - path[:, :, 1:]).masked_fill_(own == NEG_INF, 0.0)
            path = path - shift
            starts_L[:, :, p0 - c0 : p1 - c0] = path[:, :, :-1]
            weight = weight.to(self.dtype).unsqueeze(-1)
            for c in range(p0 - c0, p1 - c0):
                starts_R[:, :, c] = R
                R = torch.lerp(R, sums.R[:, :, c], weight[:, :, c - p0 + c0])
            L = path[:, :, -1]
            if p1 == end:
                L_end[rows], R_end[rows] = L.to(self.dtype), R
        return starts_L, starts_R, (L, R, L_end, R_end)

    def running(self, block: Block, top: Tensor, L0: Tensor, R0: Tensor) -> Running:
        fresh = L0 == NEG_INF
        ref, any_fresh = L0, bool(fresh.any())
        if any_fresh:
            ref = torch.where(fresh, self._first_scores(block), L0)
            ref = ref.masked_fill(ref == NEG_INF, 0.0)
        ref = ref.unsqueeze(-2)
        u = block.scores
        P = torch.exp(u - ref)
        seen = (~fresh).to(self.dtype).unsqueeze(-2)
        cum = P.cumsum(-2).add_(seen)
        if any_fresh:
            cum.masked_fill_(cum == 0, float("inf"))
        steep = ~(top.unsqueeze(-2) - ref <= RISE[self.dtype])
        flat = [self.mats(x.flatten(2, 3), self.chunk) for x in (P, cum)]
        ref, seen = (x.reshape(-1, 1, self.marks) for x in (ref, seen))
        found = None
        if bool(steep.any()):
            index = steep.flatten(0, 2).any(-1).any(-1).nonzero().squeeze(-1)
            u = u.flatten(0, 2)[index]
            slow = (~(u - ref[index] <= RISE[self.dtype]).all(-1)).cumsum(-1) > 0
            L0, R0 = L0.flatten(0, 2)[index], R0.flatten(0, 2)[index]
            found = Steep(index, slow, u, running_logsumexp(u, L0), L0, R0, block.value[index])
        return Running(*flat, ref, seen, found)

    def _first_scores(self, block: Block) -> Tensor:
        """Scores of each chunk's first kept key, (B, H, nc, M)."""
        if block.keep is None:
            return block.scores[:, :, :, 0]
        first = block.keep.int().argmax(-1)[:, None, :, None, None]
        first = first.expand(*block.scores.shape[:3], 1, self.marks)
        return block.scores.gather(3, first).squeeze(3)

    def true_L(self, running: Running) -> Tensor:
        """L_l(i) in chunk-relative time, without the decay that `u` leaves out: (Z, C, M)."""
        L = running.ref + torch.log(running.cum)
        L.masked_fill_(torch.isinf(running.cum), NEG_INF)
        if running.steep is not None:
            index, slow, _, exact, *_ = running.steep
            L[index] = torch.where(slow.unsqueeze(-1), exact, L[index])
        if self.decay is not None:
            nc = L.shape[0] // (self.batch * self.heads)
            by_head = L.view(self.batch, self.heads, nc, self.chunk, self.marks)
            by_head -= self.decay[:, None, None, :] * self.steps
        return L


def running_logsumexp(u: Tensor, L0: Tensor) -> Tensor:
    """logsumexp of L0, u_1 .. u_i for every i, (n, C, M); maximum and sum apart: L rounds once."""
    top, total, out = L0, (L0 > NEG_INF).to(u.dtype), torch.empty_like(u)
    for i in range(u.shape[1]):
        higher = torch.maximum(top, u[:, i])
        safe = higher.masked_fill(higher == NEG_INF, 0.0)
        total = total * torch.exp(top - safe) + torch.exp(u[:, i] - safe)
        top = higher
        out[:, i] = safe + torch.log(total)
    return out
