"""Masks across threads, processes, files, devices and modes."""

from __future__ import annotations

import io
import pickle
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import flashmark
from flashmark import compile_mask, masks
from tests import helpers

N = 48
IDS = torch.arange(N) // 9
EXPRESSIONS = {
    "window": masks.causal() & masks.sliding_window(9, 3),
    "chunks": masks.local_chunks(8) | masks.dilated(5),
    "not": ~masks.prefix(4) | masks.diagonal(),
    "documents": masks.causal() & masks.documents(IDS),
    "cross-documents": masks.documents(IDS, IDS.flip(0)),
    "packed": masks.packed(torch.tensor([0, 20, N]), mask=masks.causal()),
    "lengths": masks.key_padding(torch.tensor([20])) | masks.pinned(torch.tensor([2])),
    "bools": masks.key_padding(torch.arange(N)[None] < 30),
    "blocks": masks.blocks(torch.eye(3, dtype=torch.bool), 16),
    "dense": masks.dense(torch.ones(N, N, dtype=torch.bool).tril(-3)),
}


def compiled(mask, n=N, batch=1, heads=1):
    return compile_mask(mask, batch, heads, n, n, device="cpu", block_size=16)


def same(a, b):
    assert (a.layout, a.kind) == (b.layout, b.kind)
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_masks_are_loaded_by_the_default_torch_load(name):
    mask = EXPRESSIONS[name]
    loaded = reloaded({"mask": mask, "compiled": compiled(mask)})  # weights_only=True
    assert repr(loaded["mask"]) == repr(mask)
    assert same(compiled(loaded["mask"]), compiled(mask))
    assert same(loaded["compiled"], compiled(mask))
    assert same(compiled(pickle.loads(pickle.dumps(mask))), compiled(mask))


def test_a_module_with_masks_is_loaded_whole():
    module = flashmark.nn.BlockSparseAttention(16, 2, mask=EXPRESSIONS["documents"]).eval()
    x = helpers.randn(1, N, 16)
    with torch.no_grad():
        helpers.assert_identical(reloaded(module, weights_only=False)(x), module(x))


class Samples(Dataset):
    """Each sample with the mask of its own document borders."""

    def __init__(self, compile_each):
        self.compile_each = compile_each

    def __len__(self):
        return 4

    def __getitem__(self, n):
        mask = masks.causal() & masks.documents(torch.arange(N) // (5 + n))
        if not self.compile_each:
            return {"x": torch.full((2, N, 8), float(n)), "mask": masks.causal()}
        return {"x": torch.full((2, N, 8), float(n)), "mask": compiled(mask)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_joins_the_masks_of_its_samples(workers):
    query, key, value = helpers.qkv(2, 2, N, 8, grad=False)
    for start, batch in zip((0, 2), DataLoader(Samples(True), 2, num_workers=workers), strict=True):
        mask = batch["mask"]
        assert mask.shape == (2, 1, N, N)
        ids = torch.stack([torch.arange(N) // (5 + start + n) for n in range(2)])
        wanted = compiled(masks.causal() & masks.documents(ids), batch=2)
        assert torch.equal(mask.to_dense(), wanted.to_dense()) and mask.density == wanted.density
        assert torch.equal(mask.tile_grid() < 0, mask.tile_grid(transposed=True) < 0)
        helpers.assert_identical(
            flashmark.block_sparse_attention(query, key, value, mask),
            flashmark.block_sparse_attention(query, key, value, wanted),
        )


def test_joined_masks_of_many_kinds():
    kinds = [compiled(EXPRESSIONS[name]) for name in ("window", "dense", "chunks", "documents")]
    kinds += [compiled(masks.causal()), compiled(None), compiled(masks.prefix(0))]
    joined = default_collate(kinds)
    assert torch.equal(joined.to_dense(), torch.cat([m.to_dense() for m in kinds]))
    tiles = masks.blocks(torch.eye(3, dtype=torch.bool), 16)  # lists with room behind their end
    joined = masks.BlockMask.cat([compiled(tiles, batch=2), compiled(masks.diagonal())])
    assert torch.equal(joined.to_dense()[0, 0], compiled(tiles).to_dense()[0, 0])
    assert torch.equal(joined.to_dense()[1, 0], torch.eye(N, dtype=torch.bool))


def test_masks_of_other_sizes_are_not_joined():
    with pytest.raises(ValueError, match="masks: expected equal lengths"):
        default_collate([compiled(masks.causal()), compiled(masks.causal(), n=32)])


def test_expressions_of_a_batch_are_one_or_refused():
    (batch,) = DataLoader(Samples(False), 4)
    assert batch["mask"].formula == masks.causal().formula
    with pytest.raises(TypeError, match="mask: expected equal expressions"):
        default_collate([EXPRESSIONS["documents"], EXPRESSIONS["documents"]])
    with pytest.raises(TypeError, match="mask: expected equal expressions"):
        default_collate([masks.causal(), masks.diagonal()])


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_memory_is_pinned_and_moved_without_waiting(name, monkeypatch):
    calls = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pin") or x.clone())
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *args, **kw: calls.append(kw) or to(x, *args, **kw)
    )
    for mask in (EXPRESSIONS[name], compiled(EXPRESSIONS[name])):
        calls.clear()
        pinned = mask.pin_memory()
        assert calls == ["pin"] * len(mask.tensors())
        calls.clear()
        moved = pinned.to("meta", non_blocking=True)
        assert {t.device.type for t in moved.tensors()} <= {"meta"}
        assert calls == [{"non_blocking": True}] * len(mask.tensors())


MADE_IN_INFERENCE_MODE = {
    "compiled": lambda: compiled(masks.causal() & masks.sliding_window(9)),
    "moved": lambda: compiled(masks.causal() & masks.sliding_window(9)).to("cpu"),
    "mapped": lambda: torch.utils._pytree.tree_map(
        torch.Tensor.clone, compiled(masks.causal() & masks.sliding_window(9))
    ),
    "documents": lambda: masks.documents(torch.arange(N) // 9),
    "loaded": lambda: reloaded(compiled(masks.documents(IDS))),
}


@pytest.mark.parametrize("name", MADE_IN_INFERENCE_MODE)
def test_a_mask_made_in_inference_mode_serves_training(name):
    with torch.inference_mode():
        mask = MADE_IN_INFERENCE_MODE[name]()
        flashmark.block_sparse_attention(*helpers.qkv(1, 2, N, 8, grad=False), mask)
    leaves = helpers.qkv(1, 2, N, 8)
    out = flashmark.block_sparse_attention(*leaves, mask)
    wanted = flashmark.reference.block_sparse_attention(*leaves, mask)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        helpers.assert_close(a, b.double(), 5e-5)


@pytest.fixture
def elsewhere():
    """A default device that no call below names."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_mask_is_compiled_where_it_is_told_to(name, elsewhere):
    mask = compiled(EXPRESSIONS[name])
    assert {t.device.type for t in mask.tensors()} == {"cpu"}
    assert str(mask) and mask.density > 0 and mask.to_dense().device.type == "cpu"
    assert torch.equal(EXPRESSIONS[name].to_dense(1, 1, N, N), mask.to_dense())
    assert masks.from_flex(masks.to_flex(mask)).device.type == "cpu"
    x = torch.ones(1, 1, N, 8, device="cpu")
    assert flashmark.block_sparse_attention(x, x, x, EXPRESSIONS[name]).device.type == "cpu"


def test_a_function_is_evaluated_where_it_is_told_to(elsewhere):
    ids = IDS.clone()
    mask = compiled(masks.mask_mod(lambda b, h, q, kv: (ids[q] == ids[kv]) | (h == b)), 48, 2, 3)
    same_document = IDS[:, None].eq(IDS)
    assert torch.equal(mask.to_dense()[0, 1].cpu(), same_document.cpu())


def test_threads_share_a_mask():
    window, documents = EXPRESSIONS["window"], masks.causal() & masks.documents(IDS)
    wrong = []

    def serve(seed):
        for n in range(5, N, 3):
            x = helpers.randn(1, 1, n, 8, seed=seed)
            got = flashmark.block_sparse_attention(x, x, x, window, backend="eager")
            wanted = flashmark.reference.block_sparse_attention(x, x, x, window)
            if not torch.allclose(got, wanted, atol=1e-5):
                wrong.append((seed, n))
        if not same(compiled(documents), compiled(EXPRESSIONS["documents"])):
            wrong.append(seed)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
