"""Predicts many places at once from a pinned prefix; shows the effect of another mask in training.

    python -m examples.parallel_decoding

Each place after the first PREFIX bytes sees these bytes and itself (`masks.pinned`) and predicts
the byte after it, so all places are predicted in one call and none depends on another. Two models
with the same weights at the start are trained on the same text: one with the very mask object that
is used for prediction, one with a causal mask, where a place also sees the places before it.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from examples.text import BYTES, random_batches, readable, standard_library
from examples.training import train
from flashmark.generation import predict_in_parallel
from flashmark.masks import Mask, causal, pinned
from flashmark.models import Decoder, DecoderConfig
from flashmark.objectives import token_loss

PREFIX, PLACES, BATCH = 32, 64, 16
PINNED = pinned(PREFIX)  # one object, for training and for prediction
SHOWN = [0, 1, 2, 3, 4, 8, 16, 32, PLACES - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    training, validation = standard_library()
    models, batches = {}, {}
    for name, mask in {"pinned": PINNED, "causal": causal()}.items():
        torch.manual_seed(0)
        models[name] = Decoder(
            DecoderConfig(BYTES, width=128, layers=2, heads=4, hidden=256, mask=mask)
        )
        batches[name] = random_batches(training, BATCH, PREFIX + PLACES, seed=0)

    def loss(name: str, model: Decoder, step: int) -> Tensor:
        text = next(batches[name])
        return token_loss(model(text[:, :-1])[:, PREFIX:], text[:, PREFIX + 1 :])

    train(models, loss, steps)

    text = next(random_batches(validation, 128, PREFIX + PLACES, seed=1))
    print(f"\nBits for the byte after the n-th place, given {PREFIX} bytes, on unseen text:")
    print(f"{'trained':>10}{'predicts':>10}" + "".join(f"{n + 1:>7}" for n in SHOWN)
          + f"{'all':>8}")  # fmt: skip
    for name, mask in (("pinned", PINNED), ("causal", causal()), ("causal", PINNED)):
        row = bits(with_mask(models[name], mask), text)
        cells = "".join(f"{row[n]:>7.2f}" for n in SHOWN) + f"{sum(row) / PLACES:>8.2f}"
        print(f"{name:>10}{'pinned' if mask is PINNED else 'causal':>10}{cells}")
    print("The last row is a model that was trained with another mask than it predicts with.")

    model = with_mask(models["pinned"], PINNED)
    print(f"\nall {PLACES} places in one call against one at a time, in {PLACES} calls: "
          f"{'the same bits' if same_bits(model, text[:2, :-1]) else 'DIFFERENT'}")  # fmt: skip
    candidates = torch.tensor([list(b"(.,_ :=")])
    prefix = torch.tensor([list(b"    def get(self, name):\n    self")])[:, -PREFIX:]
    answer = predict_in_parallel(model, prefix, candidates)[0].argmax(-1)
    print(f"after {readable(prefix[0])!r}, one call for the likeliest byte after each of "
          + ", ".join(f"{chr(a)!r}: {readable(b[None])!r}"
                      for a, b in zip(candidates[0].tolist(), answer, strict=True)))  # fmt: skip
    print(f"\n{steps} steps, {time.perf_counter() - began:.0f} s in all.")


def with_mask(model: Decoder, mask: Mask) -> Decoder:
    for layer in model.layers:
        layer.attention.mask = mask
    return model


def bits(model: Decoder, text: Tensor) -> list[float]:
    """Bits of each place, all predicted together."""
    logits = predict_in_parallel(model, text[:, :PREFIX], text[:, PREFIX:-1])
    targets = text[:, PREFIX + 1 :]
    return [token_loss(logits[:, n], targets[:, n]).item() / math.log(2) for n in range(PLACES)]


def same_bits(model: Decoder, text: Tensor) -> bool:
    """Whether each place has the same bits in a call of its own, with other bytes elsewhere."""
    prefix, places = text[:, :PREFIX], text[:, PREFIX:]
    together = predict_in_parallel(model, prefix, places)
    for place in range(PLACES):
        others = (places + 1 + place) % BYTES
        others[:, place] = places[:, place]
        alone = predict_in_parallel(model, prefix, others)
        if not torch.equal(alone[:, place], together[:, place]):
            return False
    return True


if __name__ == "__main__":
    main()
