"""The classic bidirectional Nyströmformer, as its published weights expect it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmark.arguments import check_count, check_same, check_tensor, finite
from flashmark.autograd import under_autocast, without_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import key_padding
from flashmark.nystrom import nystrom_attention
from flashmark.nystrom.landmark_core import landmark_core, newton_schulz
from flashmark.variants.arguments import check_inputs, empty
from flashmark.variants.segments import group_mean, segment_means

INVERSES = ("exact", "original", "tikhonov")


def nystromformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int,
    conv_weight: Tensor | None = None,
    inverse: str = "exact",
    iterations: int = 6,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    pool_padding: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Bidirectional Nyström attention through segment means, with a convolution residual.

    out = softmax(q k~^T) Z softmax(q~ k^T) v + conv(v), where q~ and k~ are the means of queries
    and keys over `num_landmarks` segments and Z approximates the inverse of softmax(q~ k~^T).
    NOT causal: segment means see the future.

    Args:
        query: (B, Hq, N, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, N, D), same dtype; Hq a multiple of Hkv. Landmark queries are means over the
            query heads of a group too.
        value: (B, Hkv, N, Dv), same dtype.
        num_landmarks: 1 to 256. Where N is no multiple of it, the last segments are a token longer.
            Sequences of no more tokens than that get exact attention.
        conv_weight: (Hkv, K), K odd, or as a depthwise Conv2d holds it, (Hkv, 1, K, 1); see
            `convolution_residual`.
        inverse: Z by Newton-Schulz, started from A^T divided by the largest column sum: "exact", of
            the matrix itself; "original", of all matrices of the call, which makes a sample depend
            on the others of its batch, as published checkpoints were trained. "tikhonov":
            `flashmark.landmark_core` of the pair; the iteration has not converged after 6 steps.
        iterations: steps of Newton-Schulz.
        scale: factor of every score; 1 / sqrt(D) when None.
        key_mask: bool (B, N), True where the key takes part.
        pool_padding: segment means and the convolution include what `key_mask` hides, as the
            published model does; False leaves it out everywhere.
        backend: as for `flashmark.nystrom_attention`, which computes all but the small inverse.

    Returns:
        (B, Hq, N, Dv) in the dtype of `query`.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    The method is that of Xiong et al., "Nyströmformer" (2021).
    """
    query, key, value = under_autocast(query, key, value)
    check_inputs(query, key, value, key_mask)
    num_landmarks = check_count("num_landmarks", num_landmarks)
    iterations = check_count("iterations", iterations)
    if inverse not in INVERSES:
        raise ValueError(f"inverse: expected one of {', '.join(INVERSES)}, got {inverse!r}")
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    if not query.numel():
        return empty(query, value)
    seen = None if pool_padding else key_mask
    if seen is not None:
        key, value = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (key, value))

    if query.shape[2] <= num_landmarks:
        mask = None if key_mask is None else key_padding(key_mask)
        hidden = value if key_mask is None else value.masked_fill(~key_mask[:, None, :, None], 0.0)
        out = block_sparse_attention(query, key, hidden, mask, scale=scale, backend=backend)
    else:
        lq, _ = segment_means(group_mean(query, key.shape[1]), num_landmarks, seen)
        lk, _ = segment_means(key, num_landmarks, seen)
        core = _core(lq, lk, scale, inverse, iterations)
        out = nystrom_attention(
            query, key, value, (lq, lk), core=core, is_causal=False, scale=scale,
            key_mask=key_mask, backend=backend,
        )  # fmt: skip
    if conv_weight is None:
        return out
    residual = convolution_residual(value, conv_weight)
    return out + residual.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def _core(lq: Tensor, lk: Tensor, scale: float, inverse: str, iterations: int) -> Tensor:
    if inverse == "tikhonov":
        return landmark_core(lq, lk, scale=scale)
    if inverse == "exact":
        return landmark_core(lq, lk, scale=scale, method="newton_schulz", iterations=iterations)
    with without_autocast(lq.device.type):
        A = torch.softmax(scale * (lq @ lk.mT), -1)
        return newton_schulz(A, A.mT / A.sum(-2).max(), iterations)


def convolution_residual(value: Tensor, weight: Tensor, *, is_causal: bool = False) -> Tensor:
    """Each head's values (B, H, N, Dv) convolved along N with that head's filter of K taps.

    Two-sided: row i reads rows i - K // 2 to i + K // 2, and K is odd. `is_causal`: one-sided, row
    i reads rows i - K + 1 to i, and the last tap is row i itself. `weight` is (H, K) or
    (H, 1, K, 1). No bias; zeros beyond the ends. Add it to any attention's output.
    """
    check_tensor("value", value, 4)
    if not isinstance(weight, Tensor):
        raise TypeError(f"conv_weight: expected a tensor, got {type(weight).__name__}")
    check_same("conv_weight", weight, dtype=None, device=value.device)
    heads, taps = value.shape[1], weight.shape[-2] if weight.dim() == 4 else weight.shape[-1]
    if tuple(weight.shape) not in ((heads, taps), (heads, 1, taps, 1)) or taps < 1:
        raise ValueError(
            f"conv_weight: expected ({heads}, K) or ({heads}, 1, K, 1), got {tuple(weight.shape)}"
        )
    if not is_causal and taps % 2 == 0:
        raise ValueError(f"conv_weight: expected an odd number of taps, got {taps}")
    before, after = (taps - 1, 0) if is_causal else (taps // 2, taps // 2)
    padded = F.pad(value, (0, 0, before, after))
    return F.conv2d(padded, weight.reshape(heads, 1, taps, 1).to(value.dtype), groups=heads)
