"""Decoder and MaskedLM: causality, padding, caches, checkpoints, with every attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import landmark_parameter_groups, masks
from flashmark.generation import beam_search
from flashmark.models import Decoder, DecoderConfig, MaskedLM
from flashmark.models.decoder import ATTENTIONS
from flashmark.nn import BlockSparseAttention
from flashmark.objectives import IGNORED, corrupt, token_loss
from tests import helpers

VOCABULARY = 31
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2, hidden=24, window=8,
    landmarks=4, max_length=64,
)  # fmt: skip
CAUSAL = {
    "exact": {"attention": "exact"},
    "window": {"attention": "window"},
    "nystrom": {"attention": "nystrom"},
    "nystrom-plain-convolution": {"attention": "nystrom", "decay": False, "convolution": 3},
    "hybrid-slots": {"attention": "hybrid"},
    "hybrid-mass": {"attention": "hybrid", "merge": "mass"},
    "hybrid-gate": {"attention": "hybrid", "merge": "gate"},
    "routed": {"attention": "routed", "block_size": 4, "top_k": 2, "block_landmarks": 3},
    "routed-mean": {
        "attention": "routed",
        "block_size": 8,
        "top_k": 1,
        "near": 0,
        "block_landmarks": None,
        "convolution": 3,
    },
    "mixed-learned": {"attention": ("window", "nystrom"), "positions": "learned"},
}
GPT2 = {"norm": "layer", "activation": "gelu_tanh", "gated": False, "bias": True, "tied": False}


def model(kind=Decoder, **options):
    torch.manual_seed(0)
    return kind(dataclasses.replace(CONFIG, **options)).eval()


def ids(*shape, seed=1):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


RIGHT = torch.arange(40) < torch.tensor([40, 23, 1])[:, None]
LEFT = RIGHT.flip(1)


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_have_no_influence(name):
    decoder, tokens = model(**CAUSAL[name]), ids(2, 40)
    expected = decoder(tokens)
    for cut in (1, 9, 33):
        changed = torch.cat([tokens[:, :cut], ids(2, 40 - cut, seed=5)], 1)
        helpers.assert_identical(decoder(changed)[:, :cut], expected[:, :cut])


@pytest.mark.parametrize("lengths", [[1] * 12, [7, 1, 20, 12]], ids=["steps", "lengths"])
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_logits_equal_those_of_one_forward(name, lengths):
    decoder, tokens = model(**CAUSAL[name]), ids(3, sum(lengths))
    cache = decoder.init_cache(3, sum(lengths))
    with torch.no_grad():
        parts = [decoder(part, cache=cache) for part in tokens.split(lengths, dim=1)]
    helpers.assert_close(torch.cat(parts, 1), decoder(tokens), 1e-5)
    assert cache.length.tolist() == [sum(lengths)] * 3


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_is_as_if_it_were_not_there(name, mask):
    decoder, tokens = model(**CAUSAL[name], **GPT2), ids(3, 40)
    actual = decoder(tokens, key_mask=mask)
    cache = decoder.init_cache(3, 44)
    after = ids(3, 4, seed=7)
    with torch.no_grad():
        read = decoder(tokens, key_mask=mask, cache=cache)
        next_logits = decoder(after, cache=cache)
    assert cache.length.tolist() == [44, 27, 5]
    for row in range(3):
        kept = tokens[row, mask[row]][None]
        alone = torch.cat([kept, after[row : row + 1]], 1)
        # of two float32 results, each within 1e-5 of the definition
        helpers.assert_close(actual[row, mask[row]], decoder(alone)[0, :-4], 2e-5)
        with torch.no_grad():
            expected = decoder(alone)[0]
        helpers.assert_close(read[row, mask[row]], expected[:-4], 2e-5)
        helpers.assert_close(next_logits[row], expected[-4:], 2e-5)


@pytest.mark.parametrize("kind", [*ATTENTIONS])
def test_recomputed_activations_give_the_same_gradients(kind):
    decoder, tokens = model(attention=kind, dropout=0.2).train(), ids(2, 20)
    mask = torch.arange(20) < torch.tensor([[20], [11]])
    gradients = []
    for decoder.recompute in (False, True):
        decoder.zero_grad()
        torch.manual_seed(3)
        token_loss(decoder(tokens, key_mask=mask), tokens).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    for plain, again in zip(*gradients, strict=True):
        helpers.assert_close(again, plain, 1e-6)


@pytest.mark.parametrize("kind", [*ATTENTIONS])
def test_a_checkpoint_resumes_with_the_same_losses(kind, tmp_path):
    def start():
        decoder = model(attention=kind).train()
        return decoder, torch.optim.AdamW(landmark_parameter_groups(decoder, 0.1), lr=1e-2)

    def train(decoder, optimizer, steps):
        losses = []
        for step in steps:
            tokens = ids(2, 21, seed=step)
            loss = token_loss(decoder(tokens[:, :-1]), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    decoder, optimizer = start()
    train(decoder, optimizer, range(3))
    saved = {"model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    expected = train(decoder, optimizer, range(3, 7))

    torch.manual_seed(99)
    decoder, optimizer = start()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    decoder.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(decoder, optimizer, range(3, 7)) == expected


def test_a_module_factory_gives_a_layer_its_attention():
    made = []

    def factory(config):
        made.append(BlockSparseAttention(config.width, config.heads, softcap=5.0, sinks=True))
        return made[-1]

    decoder = model(attention=("exact", factory))
    assert decoder.layers[1].attention is made[0]
    cache = decoder.init_cache(1, 9)
    tokens = ids(1, 9)
    with torch.no_grad():
        helpers.assert_close(decoder(tokens, cache=cache), decoder(tokens), 1e-5)


LENGTHS = [9, 1, 14]
BOUNDS = torch.tensor([0, 9, 10, 24], dtype=torch.int32)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_sequences_are_as_if_alone(name):
    decoder, tokens = model(**CAUSAL[name]), ids(1, 24)
    alone = torch.cat([decoder(part) for part in tokens.split(LENGTHS, 1)], 1)
    helpers.assert_close(decoder(tokens, cu_seqlens=BOUNDS), alone, 1e-5)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_tokens_taken_back_are_as_if_never_read(name, rounds):
    decoder, tokens = model(**CAUSAL[name]), ids(2, 13)
    cache = decoder.init_cache(2, 40, rollback=5)
    decoder(tokens, cache=cache)
    kept = [*tokens]
    for number in range(rounds):
        more = ids(2, 5, seed=number + 2)
        out = decoder(more, cache=cache)
        for row in range(2):
            whole = decoder(torch.cat([kept[row], more[row]])[None])[0]
            helpers.assert_close(out[row], whole[len(kept[row]) :], 1e-5)
            kept[row] = torch.cat([kept[row], more[row, : number + 2 * row]])
        cache.crop(torch.tensor([len(x) for x in kept]))
    last = ids(2, 1, seed=9)
    out = decoder(last, cache=cache)
    for row in range(2):
        whole = decoder(torch.cat([kept[row], last[row]])[None])[0]
        helpers.assert_close(out[row, 0], whole[-1], 1e-5)


@pytest.mark.parametrize(
    "options", [{"attention": ("exact", "nystrom")}, {"convolution": 3}], ids=["state", "taps"]
)
@torch.no_grad()
def test_a_refused_crop_changes_nothing(options):
    decoder, tokens = model(**options), ids(2, 20)
    cache = decoder.init_cache(2, 30, rollback=2)
    decoder(tokens[:, :15], cache=cache)
    with pytest.raises(ValueError, match="length: expected at least"):
        cache.crop(9)
    helpers.assert_close(decoder(tokens[:, 15:], cache=cache), decoder(tokens)[:, 15:], 1e-5)


def test_embeddings_in_the_place_of_tokens():
    decoder, tokens = model(**CAUSAL["mixed-learned"]), ids(2, 9)
    embeds = decoder.embed(tokens)
    helpers.assert_identical(decoder(inputs_embeds=embeds), decoder(tokens))


MEMORY = {"memory_dim": 12}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder_reads_its_memory(name):
    """In steps with a cache as at once, padded as alone; and it does read it."""
    decoder, tokens = model(**CAUSAL[name], **MEMORY), ids(2, 15)
    memory = helpers.randn(2, 7, 12)
    key_mask = torch.arange(7) < torch.tensor([[7], [3]])
    whole = decoder(tokens, memory=memory, memory_mask=key_mask)
    alone = decoder(tokens[1:], memory=memory[1:, :3])
    helpers.assert_close(whole[1], alone[0], 1e-5)
    given = decoder.given(memory, key_mask=key_mask)
    helpers.assert_identical(given(tokens), whole)
    cache = given.init_cache(2, 15)
    with torch.no_grad():
        parts = [given(part, cache=cache) for part in tokens.split([9, 1, 5], 1)]
    helpers.assert_close(torch.cat(parts, 1), whole, 1e-5)
    assert (decoder(tokens, memory=2 * memory) - whole).abs().max() > 1e-3


@torch.no_grad()
def test_beams_of_a_decoder_read_their_own_memory():
    decoder, start, memory = model(**MEMORY), ids(2, 1), helpers.randn(2, 7, 12)
    found = beam_search(decoder.given(memory), start, 5, beams=3)
    for row in range(2):
        one = slice(row, row + 1)
        alone = beam_search(decoder.given(memory[one]), start[one], 5, beams=3)
        assert torch.equal(found.tokens[row], alone.tokens[0])


def test_every_parameter_of_a_decoder_with_a_memory_learns():
    decoder = model(**MEMORY).train()
    logits = decoder(ids(2, 9), memory=helpers.randn(2, 7, 12))
    token_loss(logits, ids(2, 9, seed=3)).backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_layers_share_the_configured_mask_object():
    mask = masks.pinned(5)
    decoder = model(mask=mask)
    assert all(layer.attention.mask is mask for layer in decoder.layers)


def test_landmarks_are_kept_out_of_weight_decay():
    decay, free = landmark_parameter_groups(model(attention=("nystrom", "hybrid")), 0.1)
    assert [group["weight_decay"] for group in (decay, free)] == [0.1, 0.0]
    assert len(free["params"]) == 3  # landmarks of both and a decay


def test_masked_lm_sees_both_sides_and_no_padding():
    lm, tokens = model(MaskedLM), ids(3, 40)
    logits = lm(tokens, key_mask=RIGHT)
    other = torch.where(RIGHT, tokens, ids(3, 40, seed=5))
    helpers.assert_identical(lm(other, key_mask=RIGHT)[RIGHT], logits[RIGHT])
    tokens[0, 39] = (tokens[0, 39] + 1) % VOCABULARY
    assert not torch.equal(lm(tokens, key_mask=RIGHT)[0, 0], logits[0, 0])


def test_masked_lm_learns_what_a_token_is_from_both_neighbours():
    """A token is the sum of its neighbours: only both sides together tell it."""
    torch.manual_seed(0)
    mask_token, vocabulary = 8, 9
    lm = MaskedLM(
        DecoderConfig(vocabulary, width=32, layers=2, heads=2, positions="learned", max_length=6)
    )
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)

    def batch():
        a, b = torch.randint(8, (2, 64))
        return torch.stack([a, (a + b) % 8, b], dim=1)

    for _ in range(250):
        tokens = batch()
        inputs, labels = corrupt(
            tokens, vocab_size=8, mask_token=mask_token, probability=0.4,
            protected=torch.tensor([True, False, True]).expand(64, 3),
        )  # fmt: skip
        optimizer.zero_grad()
        token_loss(lm(inputs), labels).backward()
        optimizer.step()
    tokens = batch()
    hidden = tokens.clone()
    hidden[:, 1] = mask_token
    filled = lm.eval().fill(hidden, mask_token)
    assert torch.equal(filled[:, ::2], tokens[:, ::2])
    assert (filled[:, 1] == tokens[:, 1]).float().mean() > 0.9


def test_labels_that_are_ignored_give_no_gradient():
    lm, tokens = model(MaskedLM), ids(1, 10)
    token_loss(lm(tokens), torch.full((1, 10), IGNORED)).backward()
    assert not any(p.grad.any() for p in lm.parameters())


def config(**options):
    return lambda decoder: dataclasses.replace(CONFIG, **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda decoder: decoder(ids(2, 3), key_mask=torch.ones(2, 5).bool()),
            ValueError,
            r"key_mask: expected shape \(2, 3\), one bool a token of this call, got \(2, 5\)",
        ),
        (
            lambda decoder: decoder(ids(2, 3), key_mask=torch.ones(2, 3)),
            TypeError,
            "key_mask: expected a bool tensor, got torch.float32",
        ),
        (
            lambda decoder: decoder(ids(2, 9), cache=decoder.init_cache(2, 8)),
            ValueError,
            "cache: expected room for 9 tokens, got max_length 8",
        ),
        (
            lambda decoder: decoder(ids(3, 2), cache=decoder.init_cache(2, 8)),
            ValueError,
            "cache: expected a batch of 3 like input_ids, got 2",
        ),
        (
            lambda decoder: decoder(ids(2, 2), cache=[None]),
            TypeError,
            "cache: expected what init_cache returns, got list",
        ),
        (
            lambda decoder: decoder(ids(2, 65)),
            ValueError,
            "input_ids: expected at most 64 tokens, the learned positions, got 65",
        ),
        (
            lambda decoder: decoder.init_cache(1, 65),
            ValueError,
            "max_length: expected at most 64, the learned positions, got 65",
        ),
        (
            lambda decoder: decoder(ids(2, 3) - 31),
            ValueError,
            r"input_ids: expected token ids from 0 to 30, got -\d+",
        ),
        (
            lambda decoder: decoder(ids(2, 3).float()),
            TypeError,
            "input_ids: expected an int32 or int64 tensor, got torch.float32",
        ),
        (
            lambda decoder: decoder(ids(3)),
            ValueError,
            r"input_ids: expected shape \(B, N\), got \(3,\)",
        ),
        (
            config(attention=("exact",)),
            ValueError,
            "attention: expected 2 of them, one a layer, got 1",
        ),
        (
            config(attention="sparse"),
            ValueError,
            "attention: expected one of exact, window, nystrom, hybrid, routed, bidirectional, "
            "got 'sparse'",
        ),
        (
            config(positions="learned", max_length=None),
            ValueError,
            "max_length: expected an int with positions='learned', got None",
        ),
        (
            config(mask=masks.causal(), attention=("exact", "hybrid")),
            ValueError,
            r"mask: expected None with attention='hybrid', which cannot follow one "
            r"\('exact' can\), got causal\(\)",
        ),
        (
            lambda decoder: model(attention="window")(ids(2, 3), mask=masks.causal()),
            ValueError,
            r"mask: expected None with attention='window', got causal\(\)",
        ),
        (
            lambda decoder: decoder(ids(2, 3), inputs_embeds=torch.zeros(2, 3, 16)),
            ValueError,
            "input_ids: expected token ids or inputs_embeds, got both",
        ),
        (
            lambda decoder: decoder(inputs_embeds=torch.zeros(2, 3, 15)),
            ValueError,
            r"inputs_embeds: expected shape \(B, N, 16\), got \(2, 3, 15\)",
        ),
        (
            lambda decoder: decoder(ids(2, 3), memory=torch.zeros(2, 3, 12)),
            ValueError,
            "memory: expected None without memory_dim in the config, got a tensor",
        ),
        (
            lambda decoder: model(memory_dim=12)(ids(2, 3)),
            ValueError,
            r"memory: expected shape \(B, S, 12\), got None",
        ),
        (
            lambda decoder: model(memory_dim=12).init_cache(2, 3),
            ValueError,
            r"memory: expected shape \(B, S, 12\), got None",
        ),
        (
            lambda decoder: decoder(ids(1, 65), cu_seqlens=torch.tensor([0, 65]).int()),
            ValueError,
            "input_ids: expected at most 64 tokens, the learned positions, got 65",
        ),
        (config(norm="batch"), ValueError, "norm: expected one of rms, layer, got 'batch'"),
        (
            lambda decoder: MaskedLM(dataclasses.replace(CONFIG, attention="window")),
            ValueError,
            "config: expected the default attention and mask, which are replaced by "
            "bidirectional ones, got attention='window', mask=None",
        ),
        (
            lambda decoder: MaskedLM(dataclasses.replace(CONFIG, convolution=4)),
            ValueError,
            "config: expected convolution=0, which is causal, got 4",
        ),
        (
            lambda decoder: MaskedLM(CONFIG).init_cache(1, 4),
            ValueError,
            "cache: expected a causal module, got is_causal=False",
        ),
    ],
    ids=lambda x: x.split(":")[0] if isinstance(x, str) else "",
)
def test_bad_input_is_one_clear_sentence(call, error, message):
    decoder = model(positions="learned")
    with torch.no_grad(), pytest.raises(error, match=f"^{message}$"):
        call(decoder)
