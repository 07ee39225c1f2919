"""Training objectives: pairs, losses, corruption."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from flashmark.objectives import (
    IGNORED,
    corrupt,
    force_after_end,
    growing_length,
    next_token_pairs,
    shift_right,
    token_loss,
)

END, PAD, CLS = 1, 0, 2
SENTENCES = [torch.tensor([7, 8, 9]), torch.tensor([5])]


def test_pairs_of_the_sentence_alone_never_predict_its_first_token():
    inputs, targets = next_token_pairs(SENTENCES, end_token=END, padding_token=PAD)
    assert inputs.tolist() == [[7, 8, 9], [5, PAD, PAD]]
    assert targets.tolist() == [[8, 9, END], [END, IGNORED, IGNORED]]


def test_pairs_with_a_first_token_predict_every_token():
    inputs, targets = next_token_pairs(SENTENCES, end_token=END, padding_token=PAD, first_token=CLS)
    assert inputs.tolist() == [[CLS, 7, 8, 9], [CLS, 5, PAD, PAD]]
    assert targets.tolist() == [[7, 8, 9, END], [5, END, IGNORED, IGNORED]]


def test_the_loss_does_not_see_padding():
    _, targets = next_token_pairs(SENTENCES, end_token=END, padding_token=PAD)
    logits = torch.randn(2, 3, 10, requires_grad=True)
    loss = token_loss(logits, targets)
    rows = [
        F.cross_entropy(logits[0], targets[0]) * 3,
        F.cross_entropy(logits[1, :1], targets[1, :1]),
    ]
    torch.testing.assert_close(loss, sum(rows) / 4)
    loss.backward()
    assert not logits.grad[1, 1:].any() and logits.grad[1, 0].any()


def test_the_loss_of_nothing_is_zero_with_zero_gradients():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = token_loss(logits, torch.full((1, 2), IGNORED))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_the_loss_of_half_precision_logits_is_summed_in_float32():
    logits = torch.randn(4, 512, 10)
    targets = torch.randint(10, (4, 512))
    half = token_loss(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, token_loss(logits.bfloat16().float(), targets))


@pytest.mark.parametrize(
    "fill, expected",
    [
        (None, [[3, END, END, END], [END, END, END, END], [3, 4, 5, 6]]),
        (PAD, [[3, END, PAD, PAD], [END, PAD, PAD, PAD], [3, 4, 5, 6]]),
    ],
    ids=["end", "padding"],
)
def test_everything_after_the_first_end_is_forced(fill, expected):
    tokens = torch.tensor([[3, END, 5, END], [END, 4, 5, 6], [3, 4, 5, 6]])
    assert force_after_end(tokens, END, fill).tolist() == expected


def test_shift_right_starts_with_the_start_token_and_replaces_ignored_labels():
    labels = torch.tensor([[7, 8, IGNORED, IGNORED], [5, 6, 7, 8]])
    shifted = shift_right(labels, start_token=3, padding_token=PAD)
    assert shifted.tolist() == [[3, 7, 8, PAD], [3, 5, 6, 7]]


def test_corruption_follows_15_percent_and_80_10_10():
    torch.manual_seed(0)
    n, vocabulary, mask_token = 200_000, 1000, 1000
    tokens = torch.randint(vocabulary, (4, n // 4))
    inputs, labels = corrupt(tokens, vocab_size=vocabulary, mask_token=mask_token)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    masked, kept = inputs[chosen] == mask_token, inputs[chosen] == tokens[chosen]
    replaced = ~masked & ~kept
    for share, expected, count in (
        (chosen, 0.15, n),
        (masked, 0.8, 0.15 * n),
        (kept, 0.1 + 0.1 / vocabulary, 0.15 * n),
        (replaced, 0.1 - 0.1 / vocabulary, 0.15 * n),
    ):
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(share.float().mean().item() - expected) < 5 * deviation
    assert len(inputs[chosen][replaced].unique()) > 0.9 * vocabulary


@pytest.mark.parametrize("by", ["ids", "mask"])
def test_protected_tokens_are_never_masked(by):
    tokens = torch.randint(5, (8, 100))
    safe = (tokens == 0) | (tokens == 3)
    inputs, labels = corrupt(
        tokens,
        vocab_size=5,
        mask_token=5,
        probability=1.0,
        protected=(0, 3) if by == "ids" else safe,
    )
    assert torch.equal(inputs[safe], tokens[safe])
    assert torch.equal(labels != IGNORED, ~safe)


def test_corruption_repeats_with_its_generator():
    tokens = torch.randint(50, (2, 64))
    first, again, other = (
        corrupt(tokens, vocab_size=50, mask_token=50, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype_is_as_good(dtype):
    tokens = torch.tensor([[7, 8, 9, 1, 4], [5, 1, 2, 2, 2]])
    narrow = tokens.to(dtype)
    for make in (
        lambda x: next_token_pairs(list(x), end_token=300, padding_token=301, first_token=302),
        lambda x: (force_after_end(x, 1, -100),),
        lambda x: (shift_right(x, start_token=300, padding_token=0),),
        lambda x: corrupt(
            x, vocab_size=1000, mask_token=999, probability=0.6, protected=(1, 500),
            generator=torch.Generator().manual_seed(0),
        ),
        lambda x: (token_loss(torch.arange(100.0).view(2, 5, 10), x),),
    ):  # fmt: skip
        for found, expected in zip(make(narrow), make(tokens), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("first", [None, CLS])
def test_pairs_of_a_matrix_of_sentences(first):
    sentences = torch.tensor([[7, 8, 9], [0, 5, 6], [3, 0, 0]])
    options = {"end_token": END, "padding_token": PAD, "first_token": first}
    for found, expected in zip(
        next_token_pairs(sentences, **options),
        next_token_pairs(list(sentences), **options),
        strict=True,
    ):
        assert torch.equal(found, expected)
    kept = [sentences[0], sentences[1, 1:], sentences[2, :1]]
    for found, expected in zip(
        next_token_pairs(sentences, key_mask=sentences != 0, **options),
        next_token_pairs(kept, **options),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.6)], ids=str)
def test_shares_of_masked_random_and_kept_tokens(shares):
    n = 40_000
    tokens = torch.randint(1000, (4, n // 4))
    inputs, labels = corrupt(
        tokens, vocab_size=1000, mask_token=1000, probability=0.5, mask_share=shares[0],
        random_share=shares[1], allowed=[2000, 2001, 2002],
    )  # fmt: skip
    chosen = labels != IGNORED
    found = [(inputs[chosen] == 1000), inputs[chosen] >= 2000]
    for share, expected in zip(found, shares, strict=True):
        deviation = math.sqrt(expected * (1 - expected) / (n / 2))
        assert abs(share.float().mean().item() - expected) <= 5 * deviation
    assert set(inputs[inputs >= 2000].tolist()) == ({2000, 2001, 2002} if shares[1] else set())
    assert torch.equal(inputs[~chosen], tokens[~chosen])


def test_words_are_chosen_whole():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (200, 12), generator=generator)
    words = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, -1, -1]).expand(200, -1)
    inputs, labels = corrupt(
        tokens, vocab_size=50, mask_token=50, words=words, probability=0.3, protected=(7,),
        generator=generator,
    )  # fmt: skip
    chosen, free = labels != IGNORED, tokens != 7
    assert not chosen[~free].any()
    for start, stop in ((0, 3), (3, 4), (4, 6), (6, 10), (10, 12)):
        word = chosen[:, start:stop] | ~free[:, start:stop]
        some = (chosen[:, start:stop]).any(1)
        assert word[some].all()
        assert abs(some.float().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 200)
    fates = (inputs == 50)[:, 6:10][chosen[:, 6:10].all(1)]
    assert (fates.any(1) & ~fates.all(1)).any()  # each token of a word meets its own


def test_growing_length_doubles_in_equal_stages():
    lengths = [growing_length(step, 40, 32, 256) for step in range(40)]
    assert lengths == [32] * 10 + [64] * 10 + [128] * 10 + [256] * 10
    assert growing_length(0, 10, 48, 100) == 48 and growing_length(99, 10, 48, 100) == 100


TOKENS = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: shift_right(TOKENS, start_token=None, padding_token=0),
            ValueError,
            "start_token: expected a token id to shift the labels right, got None",
        ),
        (
            lambda: token_loss(torch.zeros(1, 3, 5), TOKENS),
            ValueError,
            r"targets: expected shape \(1, 3\) like logits, got \(1, 2\)",
        ),
        (
            lambda: next_token_pairs([], end_token=1, padding_token=0),
            ValueError,
            "sentences: expected at least one, got none",
        ),
        (
            lambda: next_token_pairs([TOKENS[0][:0]], end_token=1, padding_token=0),
            ValueError,
            "sentences: expected at least one token in each, got an empty one",
        ),
        (
            lambda: next_token_pairs(TOKENS[:0], end_token=1, padding_token=0),
            ValueError,
            "sentences: expected at least one, got none",
        ),
        (
            lambda: next_token_pairs(
                list(TOKENS), end_token=1, padding_token=0, key_mask=TOKENS > 1
            ),
            ValueError,
            "key_mask: expected None with a sequence of sentences, got a tensor",
        ),
        (
            lambda: corrupt(TOKENS, vocab_size=3, mask_token=3, random_share=0.3),
            ValueError,
            "random_share: expected 0 to 0.2, the rest of mask_share, got 0.3",
        ),
        (
            lambda: corrupt(TOKENS, vocab_size=3, mask_token=3, allowed=[]),
            ValueError,
            "allowed: expected at least one token id, got none",
        ),
        (
            lambda: corrupt(TOKENS, vocab_size=3, mask_token=3, words=TOKENS[0]),
            ValueError,
            r"words: expected shape \(1, 2\) like tokens, got \(2,\)",
        ),
        (
            lambda: next_token_pairs([TOKENS], end_token=1, padding_token=0),
            ValueError,
            r"sentences: expected 1 dimensions in each, got shape \(1, 2\)",
        ),
        (
            lambda: corrupt(TOKENS.float(), vocab_size=3, mask_token=3),
            TypeError,
            "tokens: expected an integer tensor, got torch.float32",
        ),
        (
            lambda: corrupt(TOKENS, vocab_size=3, mask_token=3, probability=1.5),
            ValueError,
            r"probability: expected a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: corrupt(TOKENS, vocab_size=3, mask_token=3, protected=torch.ones(2).bool()),
            ValueError,
            r"protected: expected shape \(1, 2\) like tokens, got \(2,\)",
        ),
        (
            lambda: growing_length(0, 10, 20, 10),
            ValueError,
            "shortest: expected 1 to 10, the longest, got 20",
        ),
        (
            lambda: force_after_end([1, 2], 1),
            TypeError,
            "tokens: expected an integer tensor, got list",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call()
