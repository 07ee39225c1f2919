"""Beam search against all continuations; assisted generation against one token at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashmark.generation import beam_search, generate, generate_assisted
from flashmark.models import T5, T5Config
from tests.models.test_generation import ATTENTIONS, VOCABULARY, Fixed, P, ids, model

END = 1


def log_probability(decoder, prompt, tokens):
    """Log-probability of `tokens` after `prompt` (N,), up to and with the first end token."""
    logits = decoder(torch.cat([prompt, torch.tensor(tokens)])[None])[0].log_softmax(-1)
    steps = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return steps.sum().item()


def every_continuation(length, vocabulary):
    """Each once, cut after its end token."""
    found = set()
    for tokens in itertools.product(range(vocabulary), repeat=length):
        cut = tokens.index(END) + 1 if END in tokens else length
        found.add(tokens[:cut])
    return sorted(found)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("kind", ["exact", "nystrom", "hybrid"])
@torch.no_grad()
def test_enough_beams_find_the_likeliest_of_all_continuations(kind, penalty):
    decoder = model(vocab_size=4, attention=kind, window=2)
    prompts = ids(2, 5) % 4
    key_mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    found = beam_search(
        decoder, prompts, 3, beams=64, key_mask=key_mask, end_token=END, padding_token=3,
        length_penalty=penalty,
    )  # fmt: skip
    for row in range(2):
        prompt = prompts[row, key_mask[row]]
        scored = [
            (log_probability(decoder, prompt, list(tokens)) / len(tokens) ** penalty, tokens)
            for tokens in every_continuation(3, 4)
        ]
        scored.sort(reverse=True)
        for place, (score, tokens) in enumerate(scored[:5]):
            expected = [*tokens, 3, 3][:3]
            assert found.tokens[row, place].tolist() == expected
            assert abs(found.scores[row, place].item() - score) < 1e-4


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_beam_is_greedy(name):
    decoder, prompts = model(**ATTENTIONS[name]), ids(3, 9)
    expected = generate(decoder, prompts, 12, end_token=[END, 5])
    found = beam_search(decoder, prompts, 12, beams=1, end_token=[END, 5])
    assert torch.equal(found.tokens[:, 0], expected)


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_scores_are_those_of_the_tokens_found(name):
    """Caches follow their beams: else the sum over the steps would be of other tokens."""
    decoder, prompts = model(**ATTENTIONS[name]), ids(2, 9)
    found = beam_search(decoder, prompts, 10, beams=4, length_penalty=0.0, chunk=4)
    for row, place in itertools.product(range(2), range(4)):
        score = log_probability(decoder, prompts[row], found.tokens[row, place].tolist())
        assert abs(found.scores[row, place].item() - score) < 1e-3
    assert (found.scores.diff(dim=1) <= 0).all()
    assert len({tuple(x) for x in found.tokens[0].tolist()}) == 4


@torch.no_grad()
def test_beams_of_a_t5_read_their_own_source():
    torch.manual_seed(0)
    t5 = T5(T5Config(VOCABULARY, width=16, heads=2, head_dim=8, scale_outputs=False)).eval()
    source, start = ids(2, 7), torch.zeros(2, 1, dtype=torch.long)
    key_mask = torch.arange(7) < torch.tensor([[7], [3]])
    found = beam_search(t5.given(source, key_mask=key_mask), start, 5, beams=3)
    for row in range(2):
        own = source[row : row + 1, key_mask[row]]
        alone = beam_search(t5.given(own), start[:1], 5, beams=3)
        assert torch.equal(found.tokens[row], alone.tokens[0])


def test_nothing_to_search():
    assert beam_search(model(), ids(2, 5), 0, beams=3).tokens.shape == (2, 3, 0)
    assert beam_search(model(), ids(0, 5), 4, beams=3).tokens.shape[0] == 0


@pytest.mark.parametrize("ahead", [1, 3, 6])
@pytest.mark.parametrize("name", [*ATTENTIONS, "convolution"])
def test_proposals_change_no_token(name, ahead):
    """The draft is often right: a copy of the model, one weight of it moved."""
    options = ATTENTIONS.get(name, {"attention": ("hybrid", "nystrom"), "convolution": 4})
    decoder, draft = model(**options), model(**options)
    with torch.no_grad():
        draft.head.weight[::5] *= 0.2
    prompts = ids(3, 11)
    key_mask = torch.arange(11).flip(0) < torch.tensor([11, 4, 1])[:, None]
    expected = generate(decoder, prompts, 17, key_mask=key_mask)
    end = int(expected[1, 6])
    for stop in (None, [end, END]):
        wanted = generate(decoder, prompts, 17, key_mask=key_mask, end_token=stop, padding_token=0)
        found = generate_assisted(
            decoder, draft, prompts, 17, ahead=ahead, key_mask=key_mask, end_token=stop,
            padding_token=0, chunk=4,
        )  # fmt: skip
        assert torch.equal(found, wanted)


def test_a_right_draft_saves_calls():
    decoder, draft, calls = model(), model(), []
    forward = decoder.forward
    decoder.forward = lambda *args, **options: calls.append(1) or forward(*args, **options)
    found = generate_assisted(decoder, draft, ids(2, 5), 21, ahead=4)
    assert len(calls) == 1 + 4  # the prompt, then five tokens a call
    assert torch.equal(found, generate(draft, ids(2, 5), 21))


class Free(Fixed):
    """A model without memory, whose cache has nothing to forget."""

    class Cache:
        def __init__(self, batch):
            self.length = torch.zeros(batch, dtype=torch.int32)

        def crop(self, length):
            self.length = torch.minimum(self.length, length)

    def init_cache(self, batch, max_length, rollback=0):
        return self.Cache(batch)

    def __call__(self, ids, *, key_mask=None, cache=None):
        cache.length = cache.length + (ids.shape[1] if key_mask is None else key_mask.sum(1))
        return self.logits.expand(*ids.shape, -1)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"temperature": 0.5}], ids=str)
def test_sampled_tokens_have_the_distribution_of_the_model(options):
    generator = torch.Generator().manual_seed(0)
    n, options = 20_000, {"temperature": 1.0} | options
    found = generate_assisted(
        Free(P), Free(P[::-1]), ids(n, 1), 4, ahead=2, generator=generator, **options
    )
    shares = torch.tensor(P) ** (1 / options["temperature"])
    if "top_k" in options:
        shares[shares.argsort()[:2]] = 0
    shares = shares / shares.sum()
    for column in range(4):
        counts = torch.bincount(found[:, column], minlength=5) / n
        for share, p in zip(counts.tolist(), shares.tolist(), strict=True):
            assert abs(share - p) <= 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: beam_search(m, ids(1, 3), 2, beams=0), "beams: expected an int >= 1, got 0"),
        (lambda m: beam_search(m, ids(3), 2, beams=2), r"input_ids: expected a tensor of shape"),
        (
            lambda m: generate_assisted(m, m, ids(1, 3), 2, ahead=0),
            "ahead: expected an int >= 1, got 0",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call(model())
