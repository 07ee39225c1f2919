"""Routed attention: landmarks choose the blocks that each query reads."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark import reference
from flashmark.arguments import check_count
from flashmark.autograd import refuse_tracing, under_autocast, unit_stride, without_autocast
from flashmark.routed.attention import run
from flashmark.routed.checks import (
    Checked,
    check_call,
    check_landmarks,
    check_scores,
    check_state,
)
from flashmark.routed.choice import Choice, best_blocks, choose_by, far_blocks
from flashmark.routed.mass import routing_of
from flashmark.routed.places import blocks_of
from flashmark.routed.summaries import RoutedState, mean_over_heads, scores_of, summarize
from flashmark.sharded import over_shards


@over_shards
def block_scores(
    query: Tensor,
    key: Tensor,
    landmarks: Tensor | None = None,
    *,
    block_size: int = 64,
    near: int = 1,
    scale: float | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores of the key blocks, by which `routed_attention` chooses: the log of the share of the
    attention that the router expects of each.

    With landmarks x_l, block c keeps a_jl = softmax_l(scale k_j . x_l), n_cl = sum_j a_jl and
    K_cl = sum_j a_jl k_j / n_cl; without, one count and the mean key. Head g of query i sees in it
    the log mass

        r_gic = log sum_l n_cl exp(scale q_gi . K_cl)

    which by Jensen's inequality is below that of its keys, and equal to it where a landmark holds
    one key. The score is the log of the mean of softmax_c r_gic over the heads g of a group, as in
    "Native Sparse Attention": c runs over the blocks that the query may choose.

    Args:
        query, key, block_size, near, scale, query_offset, kv_lengths, key_mask, cu_seqlens: as for
            `routed_attention`.
        landmarks: (Hkv, M, D) or (B, Hkv, M, D), M from 1 to 256, or None.

    Returns:
        (B, Hkv, Nq, blocks), float32 (float64 for float64 inputs), differentiable; -inf for blocks
        that are near, unfinished or without keys. With `cu_seqlens` blocks count from each
        sequence's start. Memory is Nq x blocks: `routed_attention` never holds all of this.
    """
    refuse_tracing("block_scores")
    query, key = under_autocast(query, key)
    checked = check_call(
        query, key, key, block_size, near, scale, None, None, query_offset,
        kv_lengths, key_mask, cu_seqlens, backend,
    )  # fmt: skip
    check_landmarks(landmarks, query, key)
    if checked.backend == "reference":
        return reference.block_scores(
            query, key, landmarks, block_size=block_size, near=near, scale=scale,
            query_offset=query_offset, kv_lengths=kv_lengths, key_mask=key_mask,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    with without_autocast(query.device.type):
        blocks = checked.blocks(key, block_size)
        state = summarize(key, landmarks, checked.scale, checked.keep, blocks)
        each = scores_of(query, state, checked.scale)
        places = checked.places(query, key, block_size)
        if blocks.base is not None:  # from the packed row's numbering to the sequence's
            number = torch.arange(-(-key.shape[2] // block_size), device=each.device)
            base = blocks.base[places.at.clamp(min=0)][:, None, None, :, None]
            pick = (base + number).clamp(max=each.shape[4] - 1)
            each = each.gather(4, pick.expand(*each.shape[:4], -1))
        return mean_over_heads(each, far_blocks(places, near, None, each.shape[4])[1])


@over_shards
def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None = None,
    *,
    block_size: int = 64,
    top_k: int = 16,
    near: int = 1,
    scores: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: RoutedState | None = None,
    return_state: bool = False,
    return_routing: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple:
    """Causal attention in which each query chooses `top_k` key blocks to read, beside its own and
    the `near` blocks before it.

    Blocks are cut by position in the sequence. A query scores the finished blocks before its near
    ones by their summaries (`block_scores`) and reads those of highest score exactly. All query
    heads that share a key head share the choice. Ties go to the lower block; a score of NaN or -inf
    is never chosen. Where there are no more than `top_k` blocks, this is exact causal attention.

    Args:
        query: (B, Hq, Nq, D), float16, bfloat16, float32 or float64; D from 1 to 256. Query i sits
            at position i + Nk - Nq.
        key: (B, Hkv, Nk, D), same dtype; Hq a multiple of Hkv.
        value: (B, Hkv, Nk, Dv), same dtype; Dv from 1 to 256.
        landmarks: (Hkv, M, D) or (B, Hkv, M, D), M from 1 to 256: how a block is summarised. None:
            by its mean key. The choice gives them no gradient; see `return_routing`.
        block_size: keys of a block, 1 to 1024.
        top_k: blocks that a query chooses, 0 or more.
        near: how many blocks before its own a query always sees.
        scores: (B, Hkv, Nq, blocks), floating point: the user's own scores of blocks, instead of
            landmarks. Entries of blocks that are near or unfinished are not read.
        scale: factor of q k^T and of the scores; 1 / sqrt(D) when None.
        softcap, sinks: as in `block_sparse_attention`; scores of blocks do not know them.
        query_offset, kv_lengths, key_mask, cu_seqlens: as in `block_topk_attention`.
        state: summaries of the first blocks of `key`, from an earlier call: they are not computed
            again. `key` and `value` are those of all tokens, whatever the state holds. Not with
            `cu_seqlens`, whose sequences are whole.
        return_state: also return the `RoutedState` of all blocks that are finished.
        return_routing: also return a `Routing`: the choice, the attention mass of each chosen
            block, and the share that the router expected, from which
            `flashmark.objectives.routing_loss` trains landmarks or `scores`.
        deterministic: bitwise repeatable gradients; None follows
            `torch.are_deterministic_algorithms_enabled()`.
        backend: "auto", "triton", "cpu", "eager" or "reference". A named backend runs or raises.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of `query`, then the state and the routing where asked for.
        Gradients of query, key, value and sinks are those of the attention, exact for the choice
        that was made.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Time is N * (N / block_size) * M for the choice and N * (top_k + near + 1) * block_size for the
    attention; memory is linear. Where two scores differ by rounding, backends may choose
    differently.

    Example:
        >>> import torch
        >>> from flashmark import routed_attention
        >>> query = torch.randn(1, 4, 200, 16)
        >>> key, value = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
        >>> landmarks = torch.randn(2, 4, 16)
        >>> routed_attention(query, key, value, landmarks, block_size=16, top_k=3).shape
        torch.Size([1, 4, 200, 16])
    """
    refuse_tracing("routed_attention")
    query, key, value = under_autocast(query, key, value)
    checked = check_call(
        query, key, value, block_size, near, scale, softcap, sinks,
        query_offset, kv_lengths, key_mask, cu_seqlens, backend,
    )  # fmt: skip
    top_k = check_count("top_k", top_k, 0)
    check_landmarks(landmarks, query, key)
    check_scores(scores, landmarks, query, key, block_size)
    if (state is not None or return_state) and cu_seqlens is not None:
        raise NotImplementedError("state: expected none with cu_seqlens, got both")
    if checked.backend == "reference":
        if state is not None or return_state or return_routing:
            raise NotImplementedError(
                "backend: expected another than 'reference' with a state or routing"
            )
        return reference.routed_attention(
            query, key, value, landmarks, block_size=block_size, top_k=top_k, near=near,
            scores=scores, scale=scale, softcap=softcap, sinks=sinks, query_offset=query_offset,
            kv_lengths=kv_lengths, key_mask=key_mask, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    check_state(state, query, key, landmarks, block_size)
    held = None
    if scores is None or return_state:
        with without_autocast(query.device.type):
            # of landmarks that learn from the routing, with their gradient
            marks = landmarks if landmarks is None or return_routing else landmarks.detach()
            held = _summaries(state, key.detach(), marks, checked, block_size)
    with torch.no_grad(), without_autocast(query.device.type):
        indices = _chosen(
            query, key, None if scores is not None else held, scores, int(top_k), int(block_size),
            int(near), checked,
        )  # fmt: skip
    out, lse = run(query, key, value, indices, block_size, near, sinks, key_mask, checked,
                   deterministic)  # fmt: skip
    results: list = [out]
    if held is not None and return_state:
        finished = key.shape[2] // block_size
        results.append(RoutedState(*(x[:, :, :finished].detach() for x in held)))
    if return_routing:
        by = held if scores is None else None
        results.append(
            routing_of(query, key, by, scores, indices, lse.detach(), block_size, checked)
        )
    return tuple(results) if len(results) > 1 else out


def _chosen(
    query: Tensor, key: Tensor, state: RoutedState | None, scores: Tensor | None, top_k: int,
    block_size: int, near: int, checked: Checked,
) -> Tensor:  # fmt: skip
    """int32 (B, Hkv, Nq, K): the blocks of highest score."""
    if state is None:
        assert scores is not None
        places = checked.places(query, key, block_size)
        lowest, far = far_blocks(places, near, None, scores.shape[3])
        return best_blocks(scores, lowest, far, min(top_k, scores.shape[3]))
    base = None if checked.starts is None else checked.blocks(key, block_size).base
    call = Choice(
        unit_stride(query), *state, top_k, block_size, near, checked.scale, key.shape[2],
        checked.query_offset, checked.starts, base,
    )  # fmt: skip
    return choose_by(call, checked.backend)


def _summaries(
    state: RoutedState | None, key, landmarks, checked: Checked, block_size: int
) -> RoutedState:
    """Summaries of all finished blocks at least; those in `state` are taken from there."""
    if state is None:
        blocks = checked.blocks(key, block_size)
        return summarize(key, landmarks, checked.scale, checked.keep, blocks)
    known = state.keys.shape[2]
    if known >= key.shape[2] // block_size:  # the last block, where unfinished, is never chosen
        return state
    rest = blocks_of(key.shape[2], None, 1, block_size, key.device, known)
    return state.merge(summarize(key, landmarks, checked.scale, checked.keep, rest))
