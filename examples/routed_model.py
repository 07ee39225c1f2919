"""A trained Llama as it is, with routed attention: its loss over the number of chosen blocks.

    python examples/routed_model.py [--steps 300]

trains a small Llama of transformers on bytes of Python's standard library with exact attention,
then scores held-out text with "flashmark" and, without training, with "flashmark_routed" for
several top_k. The rows go to examples/results/routed-model-<device>.csv, and from there, with
`--report`, which trains nothing, into docs/operators/routed.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from bench.environment import describe
from examples.text import BYTES, random_batches, standard_library
from examples.training import train
from flashmark.integrations import huggingface
from flashmark.objectives import token_loss

RESULTS = Path(__file__).parent / "results"
CONTEXT, BLOCK = 512, 16
PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators" / "routed.md"
START = "<!-- routed model: python -m examples.routed_model --report -->"
END = "<!-- end of routed model -->"
CHOSEN = 0, 1, 2, 4, 8, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", action="store_true", help="write the table, train nothing")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    out = arguments.out or RESULTS / f"routed-model-{device.type}.csv"
    if arguments.report:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}\n\n{table(out)}\n\n{END}{rest.partition(END)[2]}")
        return
    huggingface.register()
    training, unseen = standard_library()
    torch.manual_seed(0)
    model = llama().to(device)
    batches = random_batches(training, arguments.batch, CONTEXT, seed=0)
    train({"exact": model}, lambda _, m, step: loss(m, next(batches).to(device)), arguments.steps)
    rows = []
    for top_k in (None, *CHOSEN):
        value = held_out(model, unseen, top_k, device)
        exact = value if top_k is None else rows[0]["nats"]
        most = CONTEXT if top_k is None else min(CONTEXT, (top_k + 2) * BLOCK)
        rows.append({
            "steps": arguments.steps, "context": CONTEXT, "block_size": BLOCK, "near": 1,
            "top_k": "" if top_k is None else top_k, "keys": most, "nats": round(value, 4),
            "more": round(value - exact, 4),
        })  # fmt: skip
        print(f"top_k {top_k}: at most {most} keys, {value:.4f} nats a byte, {value - exact:+.4f}")
    where = describe(device)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*where, *rows[0]])
        writer.writeheader()
        writer.writerows({**where, **row} for row in rows)


def table(path: Path) -> str:
    """Rows of a CSV as a table, and under what conditions they were measured."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| top_k | keys that a token reads at most | loss | more than exact |",
        "|---|---|---|---|",
    ]
    for row in rows:
        name, more = row["top_k"] or "exact", f"{float(row['more']):+.4f}" if row["top_k"] else ""
        lines.append(f"| {name} | {row['keys']} | {float(row['nats']):.4f} | {more} |")
    row = rows[0]
    lines.append(
        f"\n2 layers of width 64, {row['steps']} steps, one seed; {row['machine']}; "
        f"torch {row['torch']}; {row['date']}."
    )
    return "\n".join(lines)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=BYTES, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        attn_implementation="flashmark",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return token_loss(model(batch[:, :-1], use_cache=False).logits, batch[:, 1:])


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor, top_k: int | None, device: torch.device) -> float:
    """Mean loss of 20 batches in nats a byte, the second half of each context."""
    name = "flashmark"
    if top_k is not None:
        name = "flashmark_routed"
        huggingface.register_routed(name, block_size=BLOCK, top_k=top_k)
    model.set_attn_implementation(name)
    batches = random_batches(text, 4, CONTEXT, seed=1000)
    half = CONTEXT // 2
    losses = []
    for _ in range(20):
        batch = next(batches).to(device)
        logits = model(batch[:, :-1], use_cache=False).logits
        losses.append(token_loss(logits[:, half:], batch[:, 1 + half :]).item())
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
