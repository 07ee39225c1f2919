"""Training objectives: what goes in, what is to be predicted, and what the loss leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the target that no loss counts


def next_token_pairs(
    sentences: Sequence[Tensor],
    *,
    end_token: int,
    padding_token: int,
    first_token: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of next-token training, padded on the right.

    Without `first_token` the pair is made from the sentence alone: a sentence w1 .. wn gives the
    input w1 .. wn and the target w2 .. wn end. Its first token is given, never predicted.
    With `first_token`, a [CLS] say, the input is [CLS] w1 .. wn and the target w1 .. wn end. Every
    input then starts alike, so the first position can learn nothing but how often each token comes
    first.

    Args:
        sentences: integer tensors (n,), n >= 1, of any lengths.
        end_token: what follows the last token.
        padding_token: fills the inputs; the targets there are IGNORED.
        first_token: what every input starts with, or None.

    Returns:
        inputs and targets, int64 (B, N).
    """
    if not sentences:
        raise ValueError("sentences: expected at least one, got none")
    for sentence in sentences:
        _check_tokens("sentences", sentence, 1)
        if not len(sentence):
            raise ValueError("sentences: expected at least one token in each, got an empty one")
    first = [] if first_token is None else [first_token]
    wholes = [
        torch.cat([x.new_tensor(first), x, x.new_tensor([end_token])]).long() for x in sentences
    ]
    inputs = pad_sequence([x[:-1] for x in wholes], True, padding_token)
    return inputs, pad_sequence([x[1:] for x in wholes], True, IGNORED)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of the targets that are not IGNORED; 0 where all are.

    Args:
        logits: (..., V), any floating-point dtype; the sum is float32 at least.
        targets: (...), integers.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])} like logits, "
            f"got {tuple(targets.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp_min(1)


def force_after_end(tokens: Tensor, end_token: int, fill: int | None = None) -> Tensor:
    """The same tokens, (..., N), with `fill` (end_token when None) after the first end token.

    Of targets: the model learns that nothing follows the end. Of samples: what a sampler that runs
    on for the other rows has made of a finished one is dropped.
    """
    _check_tokens("tokens", tokens)
    ends = tokens == end_token
    after = ends.cumsum(-1) - ends.long() > 0
    return tokens.masked_fill(after, end_token if fill is None else fill)


def shift_right(labels: Tensor, *, start_token: int | None, padding_token: int | None) -> Tensor:
    """The decoder's input for `labels` (B, N): one place to the right, the start token first.

    IGNORED labels become padding, which has an embedding; None is enough where there are none.
    Source: Raffel et al., "T5" (2020).
    """
    if start_token is None:
        raise ValueError("start_token: expected a token id to shift the labels right, got None")
    _check_tokens("labels", labels)
    shifted = torch.cat([torch.full_like(labels[..., :1], start_token), labels[..., :-1]], dim=-1)
    ignored = shifted == IGNORED
    if padding_token is None:
        if bool(ignored.any()):
            raise ValueError(
                "padding_token: expected a token id in the place of IGNORED labels, got None"
            )
        return shifted
    return shifted.masked_fill(ignored, padding_token)


def corrupt(
    tokens: Tensor,
    *,
    vocab_size: int,
    mask_token: int,
    protected: Sequence[int] | Tensor = (),
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked-language-model training.

    Each token is chosen with `probability`. A chosen one is replaced by `mask_token` in 80 % of the
    cases, by a random token in 10 % and kept in 10 %. Source: Devlin et al., "BERT" (2019).

    Args:
        tokens: integers (B, N).
        vocab_size: random tokens come from 0 to vocab_size - 1.
        protected: token ids that are never chosen (padding, separators, ...), or a bool tensor
            (B, N), True where no token may be chosen.
        generator: of the random choices.

    Returns:
        inputs and labels, both like `tokens`; labels are IGNORED except where chosen.
    """
    _check_tokens("tokens", tokens)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
    if isinstance(protected, Tensor) and protected.dtype == torch.bool:
        if protected.shape != tokens.shape:
            raise ValueError(
                f"protected: expected shape {tuple(tokens.shape)} like tokens, "
                f"got {tuple(protected.shape)}"
            )
    else:
        ids = torch.as_tensor(protected, dtype=tokens.dtype, device=tokens.device)
        protected = torch.isin(tokens, ids)

    def uniform() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    chosen = (uniform() < probability) & ~protected
    what = uniform()
    other = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    inputs = torch.where(chosen & (what < 0.8), mask_token, tokens)
    inputs = torch.where(chosen & (what >= 0.9), other.to(tokens.dtype), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORED)


def growing_length(step: int, steps: int, shortest: int, longest: int) -> int:
    """The length to train at: `shortest` doubled in equal stages until it is `longest`.

    Short sequences are cheap and teach what is local; the last stage runs at full length.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest: expected 1 to {longest}, the longest, got {shortest}")
    stages = [shortest]
    while stages[-1] < longest:
        stages.append(min(2 * stages[-1], longest))
    return stages[min(len(stages) * step // max(steps, 1), len(stages) - 1)]


def _check_tokens(name: str, tokens: Tensor, dims: int | None = None) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(tokens).__name__}")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {tokens.dtype}")
    if dims is not None and tokens.dim() != dims:
        raise ValueError(
            f"{name}: expected {dims} dimensions in each, got shape {tuple(tokens.shape)}"
        )
