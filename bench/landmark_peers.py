"""Other people's linear attention on a GPU: imported when asked for, checked before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

import flashmark
from bench.peers import Unavailable, Work, first_line


def gated_linear(work: Work):
    """fla's `chunk_gla` fed our writes: our function from fla's two kernels."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.gsa.gate import fused_additive_gate
    except Exception as error:  # a package built for another Triton fails in many ways
        raise Unavailable(first_line(error)) from error

    def attention(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor) -> Tensor:
        scaled = (landmarks * work.dim**-0.5).to(query.dtype)
        core = flashmark.landmark_core(landmarks)
        reading = torch.einsum("bhnd,hmd->bnhm", query, scaled).float().softmax(-1)
        W = torch.einsum("bnhm,hml->bnhl", reading, core).to(query.dtype)
        scores = torch.einsum("bhnd,hmd->bnhm", key, scaled)
        writes, gates, _ = fused_additive_gate(scores)
        out, _ = chunk_gla(q=W, k=writes, v=value.transpose(1, 2), g=gates, scale=1.0)
        return out.transpose(1, 2)

    return attention


def bounded_memory(work: Work):
    """fla's `chunk_abc`, a related function: one softmax writes to a memory, another reads it."""
    try:
        from fla.ops.abc import chunk_abc
    except Exception as error:
        raise Unavailable(first_line(error)) from error

    def attention(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor) -> Tensor:
        scaled = (landmarks * work.dim**-0.5).to(query.dtype)
        scores = torch.einsum("bhnd,hmd->bnhm", key, scaled)
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return chunk_abc(q, k, v, scores)[0].transpose(1, 2)

    return attention


def bidirectional(work: Work):
    """nystrom-attention's, which is not causal: its attention alone, without its projections."""
    try:
        from nystrom_attention import NystromAttention
    except Exception as error:
        raise Unavailable(first_line(error)) from error
    width = work.heads * work.dim
    module = NystromAttention(width, work.dim, work.heads, work.landmarks, residual=False)
    module.to_qkv, module.to_out = torch.nn.Identity(), torch.nn.Identity()

    def attention(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor) -> Tensor:
        joined = torch.cat([x.transpose(1, 2).flatten(2) for x in (query, key, value)], dim=-1)
        out = module(joined).unflatten(-1, (work.heads, work.dim)).transpose(1, 2)
        return out + 0.0 * landmarks.sum().to(out.dtype)  # it makes its own: their gradient is 0

    return attention


# name: (how to get it, whether it computes the same function as ours)
PEERS = {
    "fla chunk_gla": (gated_linear, True),
    "fla chunk_abc": (bounded_memory, False),
    "nystrom-attention bidirectional": (bidirectional, False),
}
