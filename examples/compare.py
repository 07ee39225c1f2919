"""Trains one small decoder with every attention of this package, and compares.

    python -m examples.compare                    # what is missing in the CSV, with a progress bar
    python -m examples.compare --time             # time and memory of the attentions alone
    python -m examples.compare_report             # tables and plot from the CSVs

Tasks: the source text of Python's standard library, and associative recall in 48 and in 256
tokens. Every attention gets the same initial weights, batches and number of steps; then
`flashmark.check_causality` probes the trained model. One row of the CSV is one training; rows that
are there are not trained again, so that a run can be stopped, continued and extended. On a GPU the
sizes are larger.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.environment import describe
from bench.timing import interleaved, peak_memory
from examples.attention import byte_decoder
from examples.compare_tasks import Task, loss_in_bits, recall_task, score, text_task
from examples.compare_variants import LEAKY, VARIANTS, Rotated, Routed, TorchExact
from examples.training import learning_rate
from flashmark.causality import check_causality
from flashmark.models import Decoder
from flashmark.objectives import routing_loss

RESULTS = Path(__file__).parent / "results"
PEAK_RATE = 4e-3
ROUTER_STEPS, ROUTER_RATE = 60, 0.04  # of landmarks that learn to choose, the rest held still
LENGTHS = 2048, 8192, 32768  # where time and memory are measured, with 8 heads of 64
TOP_K = 16  # and with so many blocks of 64 tokens chosen

# width, heads, steps of each task; and the sizes of the task
SMALL = {
    "text": ((64, 2, 500), lambda: text_task(context=256, window=16, landmarks=16, batch=4)),
    "recall": ((64, 2, 600), recall_task),
    # hybrids and routed attention read as many keys and slots, 96
    "recall 256": (
        (64, 2, 300),
        lambda: recall_task(
            context=256, window=16, landmarks=64, batch=16, pairs=16, top_k=4, name="recall 256"
        ),
    ),
}
LARGE = {
    "text": ((256, 4, 4000), lambda: text_task(context=1024, window=64, landmarks=64, batch=32)),
    "recall": (
        (128, 4, 3000),
        lambda: recall_task(context=256, window=16, landmarks=32, batch=64, pairs=16),
    ),
    "recall 256": (
        (128, 4, 3000),
        lambda: recall_task(
            context=256, window=16, landmarks=64, batch=64, pairs=16, top_k=4, name="recall 256"
        ),
    ),
}


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.time:
        return measure(arguments, device)
    sizes = LARGE if device.type == "cuda" else SMALL
    tasks = {name: sizes[name][1]() for name in arguments.tasks}
    rows = read(arguments.out)
    done = {(row["task"], row["variant"], int(row["seed"]), int(row["steps"])) for row in rows}
    runs = [
        (task, variant, seed, steps)
        for seed in range(arguments.seeds)
        for task in tasks
        for variant in arguments.variants
        if (task, variant, seed, steps := arguments.steps or sizes[task][0][2]) not in done
    ]
    where, exact = describe(device), {}
    with tqdm(total=sum(steps for *_, steps in runs), unit="step", smoothing=0.05) as bar:
        for name, variant, seed, steps in runs:
            bar.set_description(f"{name}, {variant}, seed {seed}")
            width, heads, _ = sizes[name][0]
            result = train(tasks[name], variant, seed, steps, width, heads, device, bar, exact)
            append(arguments.out, {**where, **result})
    print(f"{len(runs)} trainings added to {arguments.out}, {len(rows)} were there")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--steps", type=int, help="of each training; the task's own when not given")
    parser.add_argument("--out", type=Path, help="CSV that is appended to")
    parser.add_argument("--time", action="store_true", help="measure, do not train")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="for --time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    kind = "-time" if arguments.time else ""
    device = arguments.device.split(":")[0]
    arguments.out = arguments.out or RESULTS / f"compare{kind}-{device}.csv"
    return arguments


def build(task: Task, variant: str, seed: int, width: int, heads: int) -> Decoder:
    """Decoder of a variant. All variants start from equal weights but for landmarks and gates."""

    def decoder(name: str) -> Decoder:
        torch.manual_seed(seed)
        kind = VARIANTS[name]

        def attention(heads: int, head_width: int) -> nn.Module:
            layer = kind.make(heads, head_width, task.window, task.landmarks, task.top_k)
            return Rotated(layer) if kind.rotary else layer

        return byte_decoder(attention, width=width, heads=heads)

    model = decoder(variant)
    model.load_state_dict(decoder("exact").state_dict(), strict=False)
    return model


def train(
    task: Task,
    variant: str,
    seed: int,
    steps: int,
    width: int,
    heads: int,
    device: torch.device,
    bar: tqdm,
    exact: dict[tuple, dict],
) -> dict:
    """One row: a model from its first step to its score.

    `exact` holds the newest weights that were trained with exact attention, by what they are of.
    """
    start = time.perf_counter()
    model = build(task, variant, seed, width, heads).to(device)
    if variant == "exact" or VARIANTS[variant].after_exact:
        of = task.name, seed, steps, width, heads
        if of in exact:
            bar.update(steps)
        else:
            teacher = build(task, "exact", seed, width, heads).to(device)
            fit(teacher, task, seed, steps, device, bar)
            exact.clear()
            exact[of] = teacher.state_dict()
        model.load_state_dict(exact[of], strict=False)
        fit_routers(model, task, seed, device)
    else:
        fit(model, task, seed, steps, device, bar)
    seconds = time.perf_counter() - start
    found = score(model.eval(), task, device, count=20)
    return {
        "task": task.name, "variant": variant, "seed": seed, "steps": steps,
        "context": task.context, "window": task.window, "landmarks": task.landmarks,
        "batch": task.batch, "width": width, "heads": heads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits": round(found.bits, 5), "accuracy": round(found.accuracy, 5),
        "causal": "yes" if causal(model, task, device) else "no", "seconds": round(seconds, 1),
    }  # fmt: skip


def fit(model: Decoder, task: Task, seed: int, steps: int, device: torch.device, bar: tqdm) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    batches = task.batches(seed, False)
    for step in range(steps):
        inputs, targets = (x.to(device) for x in next(batches))
        optimizer.param_groups[0]["lr"] = learning_rate(step, step / steps, PEAK_RATE)
        loss = loss_in_bits(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            bar.set_postfix_str(f"{loss.item():.2f} bits", refresh=False)
        bar.update()


def fit_routers(model: Decoder, task: Task, seed: int, device: torch.device) -> None:
    """Landmarks that learn to choose, from exact attention: nothing else of the model moves."""
    routers = [x for x in model.modules() if isinstance(x, Routed) and x.learned]
    if not routers:
        return
    model.requires_grad_(False)
    for router in routers:
        router.landmarks.requires_grad_()
        router.all_blocks = True
    optimizer = torch.optim.Adam([x.landmarks for x in routers], betas=(0.9, 0.95))
    batches = task.batches(seed, False)
    for step in range(ROUTER_STEPS):
        optimizer.param_groups[0]["lr"] = ROUTER_RATE * (1.0 - 0.9 * step / ROUTER_STEPS)
        model(next(batches)[0].to(device))
        loss = torch.stack([routing_loss(x.routing) for x in routers]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for router in routers:
        router.all_blocks = False


def causal(model: Decoder, task: Task, device: torch.device) -> bool:
    """Whether no logit of the trained model moves when a later token does."""
    tokens = next(task.batches(1_001, True))[0][:1].to(device)
    return check_causality(model, input_ids=tokens).ok


def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """Rows of time and peak memory: the attention alone, forward + backward, side by side."""
    landmarks = 64
    variants = {"torch": TorchExact().to(device)}
    variants |= {
        name: VARIANTS[name].make(8, 64, window_of(name), landmarks, TOP_K).to(device)
        for name in arguments.variants
        if name != LEAKY  # its cost is of no interest
    }
    for n in tqdm(arguments.lengths, desc="time and memory"):
        torch.manual_seed(0)
        inputs = [torch.randn(1, 8, n, 64, device=device, requires_grad=True) for _ in range(3)]
        gradient = torch.randn(1, 8, n, 64, device=device)
        runs = {name: both_ways(module, inputs, gradient) for name, module in variants.items()}
        spreads = interleaved(runs, device, rounds=7, budget=60)
        for name, run in runs.items():
            p20, p50, p80 = (round(x, 4) for x in spreads[name])
            row = {
                "variant": name, "n": n, "window": window_of(name), "landmarks": landmarks,
                "batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32",
                "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "peak_bytes": peak_memory(run, device),
            }  # fmt: skip
            append(arguments.out, {**describe(device), **row})
    print(f"{len(variants) * len(arguments.lengths)} measurements added to {arguments.out}")


def window_of(variant: str) -> int:
    """Window, or tokens of a block, where time and memory are measured."""
    return 64 if variant.startswith("routed") else 256


def both_ways(module: nn.Module, inputs: list[Tensor], gradient: Tensor):
    """Forward and backward, gradients of the attention's own parameters included."""
    wanted = [*inputs, *(x for x in module.parameters() if x.requires_grad)]
    return lambda: torch.autograd.grad(module(*inputs), wanted, gradient, allow_unused=True)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict) -> None:
    """One line, written at once: a run that is stopped loses the training it was in, no more."""
    names = list(row)
    begun = path.exists() and path.stat().st_size > 0
    if begun:  # its columns, whatever has been added to a row since
        with path.open(newline="") as file:
            names = next(csv.reader(file))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        if not begun:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
