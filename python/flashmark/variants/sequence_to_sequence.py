"""An encoder and a decoder through the same landmarks, which share a state of fixed size."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flashmark.nystrom import NystromState, nystrom_attention


class SequenceToSequence(NamedTuple):
    """The outputs of `sequence_to_sequence_attention`."""

    source: Tensor  # (B, Hq, Ns, Dv)
    cross: Tensor | None  # (B, Hq, Nt, Dv), None in the joint form
    target: Tensor  # (B, Hq, Nt, Dv)


def sequence_to_sequence_attention(
    source: tuple[Tensor, Tensor, Tensor],
    target: tuple[Tensor, Tensor, Tensor],
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    joint: bool = False,
    core: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "landmark",
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    backend: str = "auto",
) -> SequenceToSequence:
    """Nyström attention of a source and a target: S1 on the source, S2 across, S3 on the target.

    S1 is bidirectional, S3 causal, and S2 reads the source from every row of the target. With
    `joint` there is one normalisation of [S2 S3]: a row of the target is one attention over the
    whole source and the target so far, which is S3 started from the source's state.

    Args:
        source: query (B, Hq, Ns, D), key (B, Hkv, Ns, D) and value (B, Hkv, Ns, Dv).
        target: the same for the target, of length Nt.
        landmarks, core, scale, normalize, backend: as for `flashmark.nystrom_attention`.
        joint: S2 and S3 as one attention.
        source_mask, target_mask: bool (B, Ns) and (B, Nt), True where the token takes part.

    Returns:
        SequenceToSequence(source, cross, target).

    Raises:
        ValueError, TypeError, flashmark.BackendUnavailable: as `flashmark.nystrom_attention`.

    For layers with projections of their own, use `source_attention`, `cross_attention` and
    `target_attention`, of which this consists.
    """
    for name, x in (("source", source), ("target", target)):
        if not isinstance(x, tuple | list) or len(x) != 3:
            raise TypeError(f"{name}: expected (query, key, value), got {type(x).__name__}")
    options = {
        "core": core, "scale": scale, "normalize": normalize, "backend": backend,
    }  # fmt: skip
    source_out, state = source_attention(*source, landmarks, key_mask=source_mask, **options)
    cross = None if joint else cross_attention(target[0], state, landmarks, **options)
    start = state if joint else None
    target_out, _ = target_attention(
        *target, landmarks, state=start, key_mask=target_mask, **options
    )
    return SequenceToSequence(source_out, cross, target_out)


def source_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    key_mask: Tensor | None = None,
    **options,
) -> tuple[Tensor, NystromState]:
    """S1: every token of the source reads the whole source. Also returns the source's state.

    `options` are core, scale, normalize and backend of `flashmark.nystrom_attention`.
    """
    return nystrom_attention(
        query, key, value, landmarks, is_causal=False, key_mask=key_mask, return_state=True,
        **options,
    )  # fmt: skip


def cross_attention(
    query: Tensor, state: NystromState, landmarks: Tensor | tuple[Tensor, Tensor], **options
) -> Tensor:
    """S2: query (B, Hq, Nt, D) reads the source from its state, without its keys and values.

    The cost of a row does not depend on the length of the source. `options` as above.
    """
    batch, heads, _, width = state.R.shape
    nothing = (
        query.new_zeros(batch, heads, 0, query.shape[-1]),
        query.new_zeros(batch, heads, 0, width),
    )
    return nystrom_attention(query, *nothing, landmarks, is_causal=False, state=state, **options)


def target_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | tuple[Tensor, Tensor],
    *,
    state: NystromState | None = None,
    key_mask: Tensor | None = None,
    **options,
) -> tuple[Tensor, NystromState]:
    """S3: causal on the target; from the source's `state`, source and target are one attention.

    The returned state goes on from the last token, for decoding. `options` as above.
    """
    return nystrom_attention(
        query, key, value, landmarks, state=state, key_mask=key_mask, return_state=True, **options
    )
