"""generate(cuda_graph=True): a step that is captured once gives the tokens of ordinary steps.

There is no GPU here. A recorder takes the graph's place: it replays the operators of a step on the
memory that they had, so that whatever the host would have to do anew shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashmark.generation import generate, sampling
from flashmark.models import T5, T5Config
from flashmark.nn import hybrid
from tests.models.test_generation import ATTENTIONS, ids, model
from tests.recorded import record

MODELS = ATTENTIONS | {
    "mass": {"attention": "hybrid", "merge": "mass"},
    "gate": {"attention": "hybrid", "merge": "gate"},
}


def tensors_in(x, found: dict[int, Tensor], seen: set[int]) -> None:
    """All tensors that an object holds."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        found[id(x)] = x
    elif isinstance(x, dict):
        for part in x.values():
            tensors_in(part, found, seen)
    elif isinstance(x, list | tuple):
        for part in x:
            tensors_in(part, found, seen)
    elif type(x).__module__.startswith("flashmark") and hasattr(x, "__dict__"):
        tensors_in(vars(x), found, seen)


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded instead of captured, and nothing is asked that a GPU would wait for."""
    captured = []

    def capture(step, generator):
        held: dict[int, Tensor] = {}
        tensors_in([step.cache, step.token, step.finished], held, set())
        captured.append(step)
        return record(step, list(held.values()))

    monkeypatch.setattr(sampling, "capture", capture)
    monkeypatch.setattr(sampling, "check_graph", lambda device, cache: None)
    monkeypatch.setattr(hybrid, "readable", lambda x: False)
    return captured


@pytest.mark.parametrize("ending", [False, True], ids=["no-end", "end"])
@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_give_the_tokens_of_ordinary_ones(name, ending, recorded):
    decoder, prompt = model(**MODELS[name]), ids(3, 5)
    free = generate(decoder, prompt, 20)
    options = {"end_token": int(free[0, 7]), "padding_token": 0} if ending else {}
    wanted = generate(decoder, prompt, 20, **options)
    assert not recorded
    assert torch.equal(generate(decoder, prompt, 20, cuda_graph=True, **options), wanted)
    assert len(recorded) == 1


@pytest.mark.parametrize("name", ["exact", "nystrom", "hybrid"])
def test_the_cache_holds_the_conversation_alone(name, recorded):
    decoder, prompt = model(**MODELS[name]), ids(3, 5)
    free = generate(decoder, prompt, 20)
    end = int(free[1, 6])
    caches = [decoder.init_cache(3, 40) for _ in range(2)]
    for cache, graph in zip(caches, (False, True), strict=True):
        generate(decoder, prompt, 20, end_token=end, cache=cache, cuda_graph=graph)
    assert caches[0].length.tolist() == caches[1].length.tolist()
    more = ids(3, 4, seed=3)
    first, second = (generate(decoder, more, 6, cache=cache) for cache in caches)
    assert torch.equal(first, second)


def test_an_encoder_decoder(recorded):
    torch.manual_seed(0)
    t5 = T5(T5Config(vocab_size=37, width=32, heads=4, head_dim=8, hidden=40)).eval()
    given = t5.given(ids(2, 9))
    start = torch.zeros(2, 1, dtype=torch.long)
    wanted = generate(given, start, 15)
    assert torch.equal(generate(given, start, 15, cuda_graph=True), wanted)
    assert recorded


def test_all_finished_long_before_the_last_token(recorded, monkeypatch):
    """Tokens after the last end are cut off, whenever it is looked at."""
    decoder, prompt = model(), ids(1, 5)
    free = generate(decoder, prompt, 20)
    end = int(free[0, 4])
    wanted = generate(decoder, prompt, 20, end_token=end)
    assert wanted.shape[1] < 20
    for every in (1, 3, 16, 64):
        monkeypatch.setattr(sampling, "LOOK_EVERY", every)
        actual = generate(decoder, prompt, 20, end_token=end, cuda_graph=True)
        assert torch.equal(actual, wanted), every


def test_steps_look_at_the_finished_samples_every_16_tokens(recorded, monkeypatch):
    looks, all_ = [], Tensor.all

    def note(x, *args, **kwargs):
        looks.append(x.shape)
        return all_(x, *args, **kwargs)

    decoder, prompt = model(), ids(2, 5)
    unused = next(t for t in range(37) if not (generate(decoder, prompt, 40) == t).any())
    monkeypatch.setattr(Tensor, "all", note)
    generate(decoder, prompt, 40, end_token=unused, cuda_graph=True)
    assert [x for x in looks if x == (2,)] == [(2,)] * 2


def test_off_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="cuda_graph: expected prompts on an NVIDIA GPU"):
        generate(model(), ids(1, 5), 4, cuda_graph=True)


def test_a_cache_that_takes_tokens_back_is_refused(monkeypatch):
    from flashmark.generation.graphs import check_graph

    cache = model(attention="nystrom").init_cache(1, 9, rollback=2)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ValueError, match="without rollback .* got rollback=2"):
        check_graph(torch.device("cuda"), cache)
