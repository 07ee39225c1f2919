"""First-k landmarks: exact attention for the first tokens, landmarks from them for the rest."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashmark.arguments import check_count, finite
from flashmark.autograd import under_autocast
from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import causal
from flashmark.nystrom.attention import NORMALIZATIONS, nystrom_attention
from flashmark.nystrom.checks import MAX_LANDMARKS
from flashmark.nystrom.landmark_core import landmark_core
from flashmark.nystrom.state import NystromState
from flashmark.variants.arguments import check_inputs, empty
from flashmark.variants.padding import without_padding
from flashmark.variants.segments import group_mean, segment_means


class FirstKState(NamedTuple):
    """All that first-k attention keeps of the tokens it has consumed. At most k + 1 tokens' worth
    and a state of constant size; `landmarks`, `core` and `rest` are None until k tokens are there.
    """

    query: Tensor  # (B, Hkv, n, D): means over the query heads of a group, n <= k
    key: Tensor  # (B, Hkv, n, D)
    value: Tensor  # (B, Hkv, n, Dv)
    landmarks: tuple[Tensor, Tensor] | None  # of queries and of keys, (B, Hkv, M, D) each
    core: Tensor | None  # (B, Hkv, M, M)
    rest: NystromState | None  # of all tokens


torch.serialization.add_safe_globals([FirstKState])  # for torch.load, weights_only=True


def first_k_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int,
    num_landmarks: int | None = None,
    tied: bool = True,
    normalize: str = "landmark",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    state: FirstKState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, FirstKState]:
    """Causal attention, exact for the first k tokens; they are the landmarks of all later ones.

    Rows i < first are exact. Rows after them are `flashmark.nystrom_attention` over all tokens up
    to i, with landmarks that are means of consecutive runs of the first keys: they are known
    before the first row that reads them, so nothing of the future is used.

    Args:
        query: (B, Hq, N, D), float16, bfloat16, float32 or float64.
        key: (B, Hkv, N, D), same dtype; Hq a multiple of Hkv.
        value: (B, Hkv, N, Dv), same dtype.
        first: k >= 1; with k >= N all rows are exact.
        num_landmarks: 1 to min(k, 256) means; k when None: the first keys themselves.
        tied: landmark queries are the landmark keys, the better conditioned choice. False: they are
            means of the first queries, over the query heads of a group too.
        normalize: "landmark" or "mass", as for `flashmark.nystrom_attention`.
        scale: factor of every score; 1 / sqrt(D) when None.
        key_mask: bool (B, N), True where the token takes part. The others are as if they had been
            taken out before (the first k tokens are the first that take part), their rows are 0.
        state: what the tokens before left, from `return_state` with the same options. Not together
            with `key_mask`.
        return_state: also return the state after the last token.
        backend: as for the two operators.

    Returns:
        (B, Hq, N, Dv) in the dtype of `query`; with `return_state` also a FirstKState. Rows that
        see no key are 0. Any split of a sequence into calls gives the same outputs.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.
    """
    query, key, value = under_autocast(query, key, value)
    check_inputs(query, key, value, key_mask)
    first = check_count("first", first)
    if num_landmarks is None:
        num_landmarks = first
    most = min(first, MAX_LANDMARKS)
    if check_count("num_landmarks", num_landmarks) > most:
        raise ValueError(f"num_landmarks: expected 1 to {most}, got {num_landmarks}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected 'landmark' or 'mass', got {normalize!r}")
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else finite("scale", scale)
    if key_mask is not None and (state is not None or return_state):
        raise ValueError("key_mask: expected None with a state, got a tensor")
    if key_mask is not None and query.numel():
        attend = functools.partial(
            first_k_attention, first=first, num_landmarks=num_landmarks, tied=tied,
            normalize=normalize, scale=scale, backend=backend,
        )  # fmt: skip
        return without_padding(attend, query, key, value, key_mask)

    if state is None:
        means = group_mean(query[:, :, :0], key.shape[1])
        state = FirstKState(means, key[:, :, :0], value[:, :, :0], None, None, None)
    _check_state(state, first, key, value)
    if not query.numel():
        out = empty(query, value)
        return (out, state) if return_state else out
    left = first - state.key.shape[2]  # tokens whose rows are exact
    outputs = []
    if left:
        state = _with_first(state, *(x[:, :, :left] for x in (query, key, value)))
        outputs.append(
            block_sparse_attention(
                query[:, :, :left], state.key, state.value, causal(), scale=scale, backend=backend
            )
        )
    options = {"scale": scale, "normalize": normalize, "backend": backend}
    more = query.shape[2] > left
    if state.rest is None and state.key.shape[2] == first and (more or return_state):
        state = _with_landmarks(state, num_landmarks, tied, options)
    if more:
        landmarks = state.landmarks[0] if tied else state.landmarks
        out = nystrom_attention(
            *(x[:, :, left:] for x in (query, key, value)), landmarks, core=state.core,
            state=state.rest, return_state=return_state, **options,
        )  # fmt: skip
        if return_state:
            out, rest = out
            state = state._replace(rest=rest)
        outputs.append(out)
    out = torch.cat(outputs, dim=2)
    return (out, state) if return_state else out


def _with_first(state: FirstKState, query: Tensor, key: Tensor, value: Tensor) -> FirstKState:
    means = group_mean(query, key.shape[1])
    new = (torch.cat(pair, 2) for pair in zip(state[:3], (means, key, value), strict=True))
    return FirstKState(*new, None, None, None)


def _with_landmarks(state: FirstKState, count: int, tied: bool, options: dict) -> FirstKState:
    """The landmarks of the first k tokens, and what these tokens leave behind."""
    lk, _ = segment_means(state.key, count)
    lq = lk if tied else segment_means(state.query, count)[0]
    kind = "softmax" if options["normalize"] == "landmark" else "kernel"
    core = landmark_core(lq, None if tied else lk, scale=options["scale"], kind=kind)
    _, rest = nystrom_attention(  # no query: only the state
        state.key[:, :, :0], state.key, state.value, lk if tied else (lq, lk), core=core,
        is_causal=False, return_state=True, **options,
    )  # fmt: skip
    return state._replace(landmarks=(lq, lk), core=core, rest=rest)


def _check_state(state: FirstKState, first: int, key: Tensor, value: Tensor) -> None:
    if not isinstance(state, FirstKState):
        raise TypeError(f"state: expected a FirstKState, got {type(state).__name__}")
    held = state.key.shape[2]
    if held > first or (held < first) != (state.rest is None):
        raise ValueError(f"state: expected one made with first={first}, got {held} first tokens")
    for name, found, x in (("key", state.key, key), ("value", state.value, value)):
        wanted = (*x.shape[:2], held, x.shape[3])
        if found.shape != wanted or found.device != x.device:
            raise ValueError(
                f"state.{name}: expected shape {wanted} on {x.device}, "
                f"got {tuple(found.shape)} on {found.device}"
            )
        if found.dtype != x.dtype:
            raise TypeError(f"state.{name}: expected {x.dtype}, got {found.dtype}")
