"""Trains a small decoder on real text with different attentions, then proves and measures each.

    make demo        or        python -m examples.demo --seconds 100

The text is the source of Python's own standard library, so every machine has it. Every attention
gets the same initial weights, the same batches and the same number of steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashmark
from bench.environment import machine
from bench.progress import progress_bar
from bench.timing import interleaved, peak_memory
from examples.attention import byte_decoder
from examples.text import random_batches, standard_library
from examples.training import Training, bits_per_byte, learning_rate
from flashmark.dispatch import choose_backend
from flashmark.masks import causal, prefix, sliding_window
from flashmark.models import Decoder

BATCH, CONTEXT, STEPS = 8, 256, 400
LENGTHS = 2048, 8192  # where speed and memory are measured, with 8 heads of 64
HEADS, WIDTH = 8, 64


class Torch(nn.Module):
    """The yardstick: torch's own attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        return None

    def decoder(self, key: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
        """The attention of one new query to a cache of keys and values."""
        return lambda query: F.scaled_dot_product_attention(query, key, value)


class Exact(nn.Module):
    """Exact attention over the keys that a mask shows."""

    def __init__(self, mask: flashmark.masks.Mask):
        super().__init__()
        self.mask = mask

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flashmark.block_sparse_attention(query, key, value, self.mask)

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> flashmark.Report:
        return flashmark.check(flashmark.block_sparse_attention, query, key, value, self.mask)

    def decoder(self, key: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
        size = key.shape[2]
        mask = flashmark.compile_mask(self.mask, 1, 1, size, size, device=key.device)
        return lambda query: flashmark.block_sparse_attention(
            query, key, value, mask, query_offset=size - 1
        )


class Nystrom(nn.Module):
    """Linear attention through learned landmarks; decodes from a state of fixed size, no cache."""

    def __init__(self, heads: int, width: int, landmarks: int = 32):
        super().__init__()
        self.landmarks = nn.Parameter(flashmark.init_landmarks(heads, landmarks, width))
        # memories of 1 to 8000 tokens: a landmark's content fades by exp(-decay) a token
        self.log_decay = nn.Parameter(-torch.linspace(0, 9, landmarks).repeat(heads, 1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flashmark.nystrom_attention(
            query, key, value, self.landmarks, decay=self.log_decay.exp()
        )

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> flashmark.Report:
        decay = self.log_decay.exp()
        return flashmark.check(
            flashmark.nystrom_attention, query, key, value, self.landmarks, decay=decay
        )

    def decoder(self, key: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
        fixed = {"core": flashmark.landmark_core(self.landmarks), "decay": self.log_decay.exp()}
        past = key[:, :, :-1], key[:, :, :-1], value[:, :, :-1]
        _, state = flashmark.nystrom_attention(*past, self.landmarks, **fixed, return_state=True)
        key, value = key[:, :, -1:], value[:, :, -1:]

        def step(query: Tensor) -> Tensor:
            out, _ = flashmark.nystrom_attention(
                query, key, value, self.landmarks, **fixed, state=state, return_state=True
            )
            return out

        return step


# name -> a layer's attention for (heads, head width)
ATTENTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "torch causal": lambda heads, width: Torch(),
    "exact causal": lambda heads, width: Exact(causal()),
    "window 64 + sink 4": lambda heads, width: Exact(causal() & (sliding_window(64) | prefix(4))),
    "causal Nyström, M = 32": Nystrom,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=100, help="time for training, all together"
    )
    parser.add_argument("--lengths", type=int, nargs=2, default=LENGTHS, help="sizes to measure at")
    arguments = parser.parse_args()
    start = time.perf_counter()
    where = f"{machine(torch.device('cpu'))}, torch {torch.__version__}"
    print(f"flashmark {flashmark.__version__} on {where}")
    print(f"backends: exact {backend('block_sparse')}, Nyström {backend('nystrom')}\n")

    rows: dict[str, dict] = {name: {} for name in ATTENTIONS}
    first, *others = arguments.lengths
    measure(rows, first)
    print(f"One attention over {first} tokens, forward + backward:")
    for name, row in rows.items():
        print(f"  {name:<24}{row[first][0]:8.1f} ms")
    print(
        f"\nNow {len(rows)} small decoders are trained, one with each attention, for at most "
        f"{arguments.seconds:.0f} s;\nthen each is held to its float64 definition, and the "
        "table follows.\n"
    )

    training, validation = standard_library()
    models, steps = train_side_by_side(training, arguments.seconds)
    for name, model in models.items():
        rows[name] |= prove(model, validation)
    for n in others:
        measure(rows, n)
    measure_decoding(rows, max(arguments.lengths))

    print_table(rows, arguments.lengths, steps)
    text = steps * BATCH * CONTEXT / 1e6
    print(
        f"\nEvery model: 2 layers, context {CONTEXT}, the same first weights and the same "
        f"{text:.2f} million bytes.\n"
        f"So few steps show that a model learns, not how well it can: docs/comparison.md does.\n"
        f"Times: medians of the attention alone, float32, {HEADS} heads of {WIDTH}; "
        f'"torch causal" is\nscaled_dot_product_attention(is_causal=True), and less than 1.0 '
        f"is slower than it.\n{where}; {time.perf_counter() - start:.0f} s in all."
    )
    red = [name for name, row in rows.items() if not (row["causal"] and within_budget(row))]
    if red:
        raise SystemExit(f"NOT PROVED: {', '.join(red)}")


def train_side_by_side(text: Tensor, seconds: float) -> tuple[dict[str, Decoder], int]:
    """A model for each attention: same weights, same batches, until the time or STEPS is up."""
    torch.manual_seed(0)
    models = {name: byte_decoder(attention) for name, attention in ATTENTIONS.items()}
    shared = next(iter(models.values())).state_dict()
    for model in models.values():
        model.load_state_dict(shared, strict=False)  # not strict: landmarks are an attention's own
    trainings = [Training(model) for model in models.values()]
    batches = random_batches(text, BATCH, CONTEXT, seed=0)
    start, step, progress = time.perf_counter(), 0, 0.0
    with progress_bar(STEPS, f"training {len(models)} models") as bar:
        while progress < 1.0:
            batch, rate = next(batches), learning_rate(step, progress)
            losses = [training.step(batch, rate) for training in trainings]
            step += 1
            progress = max(step / STEPS, (time.perf_counter() - start) / seconds)
            bar.set_postfix_str(" ".join(f"{x:.2f}" for x in losses) + " bits/byte", refresh=False)
            bar.update()
    return models, step


def prove(model: Decoder, validation: Tensor) -> dict:
    """The columns of the table that come from the trained model."""
    return {
        "bits": validation_bits(model, validation),
        "causal": blind_to_the_future(model, validation),
        "report": check_on_trained_inputs(model, validation[:CONTEXT]),
    }


@torch.no_grad()
def validation_bits(model: Decoder, validation: Tensor, batches: int = 12) -> float:
    windows = random_batches(validation, BATCH, CONTEXT, seed=1)
    return statistics.mean(bits_per_byte(model, next(windows)).item() for _ in range(batches))


@torch.no_grad()
def blind_to_the_future(model: Decoder, text: Tensor) -> bool:
    """Check that replacing every byte from a place on changes no bit of the logits before it."""
    places = [cut - 1 for cut in (1, 50, 128, 200, CONTEXT - 1)]
    return flashmark.check_causality(model, positions=places, input_ids=text[None, :CONTEXT]).ok


def check_on_trained_inputs(model: Decoder, text: Tensor) -> flashmark.Report | None:
    """The last layer's attention on what really reaches it, against the float64 reference."""
    attention, seen = model.layers[-1].attention.attention, []
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    with torch.no_grad():
        model(text[None])
    handle.remove()
    return attention.check(*seen)


def measure(rows: dict[str, dict], n: int) -> None:
    """Forward + backward of the attention alone, all of them interleaved; peak memory beside it."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(1, HEADS, n, WIDTH)
    device = gradient.device

    def forward_and_backward(attention: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(*inputs), inputs, gradient)

    runs = {name: forward_and_backward(ATTENTIONS[name](HEADS, WIDTH)) for name in rows}
    spreads = interleaved(runs, device, rounds=5, budget=15)
    for name, row in rows.items():
        row[n] = spreads[name].p50, peak_memory(runs[name], device)


@torch.no_grad()
def measure_decoding(rows: dict[str, dict], n: int) -> None:
    """One more token after n of them."""
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, 1, WIDTH)
    key, value = (torch.randn(1, HEADS, n, WIDTH) for _ in range(2))

    def one_token(name: str) -> Callable[[], object]:
        decode = ATTENTIONS[name](HEADS, WIDTH).decoder(key, value)
        return lambda: decode(query)

    spreads = interleaved({name: one_token(name) for name in rows}, query.device, rounds=5)
    for name, row in rows.items():
        row["decode"] = spreads[name].p50


def within_budget(row: dict) -> bool:
    return row["report"] is None or row["report"].ok


def backend(operator: str) -> str:
    """Backend that backend="auto" takes for the float32 CPU tensors of this demo."""
    return choose_backend(operator, "auto", torch.empty(1, 1, 1, WIDTH))


def print_table(rows: dict[str, dict], lengths: list[int], steps: int) -> None:
    """A column an attention. Speed-ups are shown only where the checks passed."""
    yardstick = next(iter(rows.values()))
    lines = [
        (f"bits per byte on unseen text, {steps} steps", lambda row: f"{row['bits']:.3f}"),
        (
            "past logits when the future changes",
            lambda row: "same bits" if row["causal"] else "MOVED",
        ),
        ("largest error against float64: output", lambda row: errors(row)[0]),
        ("                           gradients", lambda row: errors(row)[1]),
    ]
    for n in lengths:

        def faster(row: dict, n: int = n) -> str:
            green = row["causal"] and within_budget(row)
            return f"{yardstick[n][0] / row[n][0]:.1f}" if green else "red"

        def peak(row: dict, n: int = n) -> str:
            return "-" if row[n][1] is None else f"{row[n][1] / 2**20:.0f}"

        lines += [
            (f"N = {n}, forward + backward: ms", lambda row, n=n: f"{row[n][0]:.0f}"),
            ("    times as fast as torch causal", faster),
            ("    peak MiB", peak),
        ]
    lines.append((f"one more token after {max(lengths)}: ms", lambda row: f"{row['decode']:.2f}"))
    widths = {name: max(len(name), 9) + 3 for name in rows}
    print("\n" + " " * 44 + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for label, cell in lines:
        cells = (f"{cell(rows[name]):>{width}}" for name, width in widths.items())
        print(f"{label:<44}" + "".join(cells))


def errors(row: dict) -> tuple[str, str]:
    """Largest relative error of the output and of any gradient; the yardstick is not checked."""
    if row["report"] is None:
        return "-", "-"
    found = {part.name: part.error for part in row["report"].rows}
    return f"{found.pop('out'):.1e}", f"{max(found.values()):.1e}"


if __name__ == "__main__":
    main()
