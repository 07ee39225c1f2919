"""Training objectives: inputs, targets, and tokens that the loss leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flashmark.routed import Routing

IGNORED = -100  # the target that no loss counts


def next_token_pairs(
    sentences: Sequence[Tensor] | Tensor,
    *,
    end_token: int,
    padding_token: int,
    first_token: int | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of next-token training, padded on the right.

    Without `first_token` the pair is made from the sentence alone: a sentence w1 .. wn gives the
    input w1 .. wn and the target w2 .. wn end. Its first token is given, never predicted.
    With `first_token`, a [CLS] say, the input is [CLS] w1 .. wn and the target w1 .. wn end. Every
    input then starts alike, so the first position can learn nothing but how often each token comes
    first.

    Args:
        sentences: tensors (n,) of any integer dtype, n >= 1, of any lengths; or one tensor (B, n).
        end_token: what follows the last token.
        padding_token: fills the inputs; the targets there are IGNORED.
        first_token: what every input starts with, or None.
        key_mask: bool (B, n), with one tensor (B, n): False where a token is padding, which is left
            out.

    Returns:
        inputs and targets, int64 (B, N).
    """
    if isinstance(sentences, Tensor):
        _check_tokens("sentences", sentences, 2)
        if key_mask is not None:
            _check_mask("key_mask", key_mask, "sentences", sentences)
            sentences = [row[kept] for row, kept in zip(sentences, key_mask, strict=True)]
    elif key_mask is not None:
        raise ValueError("key_mask: expected None with a sequence of sentences, got a tensor")
    if not len(sentences):
        raise ValueError("sentences: expected at least one, got none")
    for sentence in sentences:
        _check_tokens("sentences", sentence, 1)
        if not len(sentence):
            raise ValueError("sentences: expected at least one token in each, got an empty one")
    first = [] if first_token is None else [first_token]
    wholes = []
    for sentence in sentences:
        x = sentence.long()
        wholes.append(torch.cat([x.new_tensor(first), x, x.new_tensor([end_token])]))
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
    targets = targets.long()
    total = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp_min(1)


def routing_loss(routing: Routing) -> Tensor:
    """Mean divergence, in nats, of the share of attention that a router expects from what it is.

    KL(p || q) over the chosen blocks of each query token and key head, with p the mass of each as
    a share of the mass of all chosen ones, a constant, and q the share that the router expects. It
    learns of the chosen blocks alone: in the first steps, choose all of them. Rows that
    chose no block, or whose chosen blocks hold no mass, are left out; 0 where all are.

    Args:
        routing: from `routed_attention(..., return_routing=True)`. Gradients reach the landmarks or
            the scores of that call, and nothing else: add the loss to that of the task.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), which trains its index branch so.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    mass = routing.mass.detach()
    total = mass.sum(-1, keepdim=True)
    share = mass / total.masked_fill(total == 0.0, 1.0)
    expected = routing.log_probs.masked_fill(routing.indices < 0, 0.0)
    divergence = (torch.xlogy(share, share) - share * expected).sum(-1)
    return divergence.sum() / (total > 0.0).sum().clamp_min(1)


def force_after_end(tokens: Tensor, end_token: int, fill: int | None = None) -> Tensor:
    """Int64 tokens (..., N) with `fill` (end_token when None) after the first end token.

    Of targets: the model learns that nothing follows the end. Of samples: what a sampler that runs
    on for the other rows has made of a finished one is dropped.
    """
    _check_tokens("tokens", tokens)
    tokens = tokens.long()
    ends = tokens == end_token
    after = ends.cumsum(-1) - ends.long() > 0
    return tokens.masked_fill(after, end_token if fill is None else fill)


def shift_right(labels: Tensor, *, start_token: int | None, padding_token: int | None) -> Tensor:
    """Int64 input of a decoder for `labels` (B, N): one place to the right, a start token first.

    IGNORED labels become padding, which has an embedding; None is enough where there are none.
    Source: Raffel et al., "T5" (2020).
    """
    if start_token is None:
        raise ValueError("start_token: expected a token id to shift the labels right, got None")
    _check_tokens("labels", labels)
    labels = labels.long()
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
    allowed: Sequence[int] | Tensor | None = None,
    words: Tensor | None = None,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked-language-model training.

    Each token is chosen with `probability`. A chosen one is replaced by `mask_token` in a share of
    the cases, by a random token in another, and kept in the rest. The default shares, 80 %, 10 %
    and 10 %, are those of Devlin et al., "BERT" (2019).

    Args:
        tokens: (B, N), any integer dtype.
        vocab_size: random tokens come from 0 to vocab_size - 1.
        mask_token: what a masked token becomes.
        protected: token ids that are never chosen (padding, separators, ...), or a bool tensor
            (B, N), True where no token may be chosen.
        allowed: token ids that random tokens come from, instead of the whole vocabulary.
        words: integers (B, N), a run of equal ones a word: its tokens are chosen together, but for
            protected ones. Each of them then meets its own fate.
        mask_share, random_share: of the chosen tokens; together at most 1.
        generator: of the random choices.

    Returns:
        inputs and labels, int64 (B, N); labels are IGNORED except where chosen.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape or dtype.
    """
    _check_tokens("tokens", tokens)
    for name, share in (("probability", probability), ("mask_share", mask_share)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1], got {share}")
    if not 0.0 <= random_share <= 1.0 - mask_share + 1e-9:
        raise ValueError(
            f"random_share: expected 0 to {1.0 - mask_share:g}, the rest of mask_share, "
            f"got {random_share}"
        )
    tokens = tokens.long()
    if isinstance(protected, Tensor) and protected.dtype == torch.bool:
        _check_mask("protected", protected, "tokens", tokens)
    else:
        protected = torch.isin(tokens, _ids("protected", protected, tokens))

    def uniform() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    draw = uniform()
    if words is not None:
        draw = _once_a_word(draw, words, tokens)
    chosen = (draw < probability) & ~protected
    fate = uniform()
    if allowed is None:
        other = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    else:
        choices = _ids("allowed", allowed, tokens)
        if not len(choices):
            raise ValueError("allowed: expected at least one token id, got none")
        index = torch.randint(len(choices), tokens.shape, generator=generator, device=tokens.device)
        other = choices[index]
    inputs = torch.where(chosen & (fate < mask_share), mask_token, tokens)
    replaced = chosen & (fate >= mask_share) & (fate < mask_share + random_share)
    inputs = torch.where(replaced, other, inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORED)


def _once_a_word(draw: Tensor, words: Tensor, tokens: Tensor) -> Tensor:
    """The random number (B, N) of each word's first token, for all of its tokens."""
    _check_tokens("words", words)
    if words.shape != tokens.shape:
        raise ValueError(
            f"words: expected shape {tuple(tokens.shape)} like tokens, got {tuple(words.shape)}"
        )
    places = torch.arange(words.shape[-1], device=words.device).expand_as(words)
    begins = torch.ones_like(words, dtype=torch.bool)
    begins[..., 1:] = words[..., 1:] != words[..., :-1]
    first = places.where(begins, 0).cummax(-1).values
    return draw.gather(-1, first)


def _ids(name: str, ids: Sequence[int] | Tensor, tokens: Tensor) -> Tensor:
    """Token ids as an int64 tensor (n,) beside `tokens`."""
    if isinstance(ids, Tensor):
        _check_tokens(name, ids, 1)
    return torch.as_tensor(ids, device=tokens.device).long()


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


def _check_mask(name: str, mask: Tensor, like: str, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    if mask.shape != tokens.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(tokens.shape)} like {like}, got {tuple(mask.shape)}"
        )
