"""Landmark attention in trained models of transformers, from conversion to generation.

    python examples/converted_model.py            (needs transformers, accelerate and peft)

converts a small random Llama, GPT-2 and Qwen2, trains each for 50 steps with the Trainer's
defaults, saves and loads it, trains a low-rank adapter, and generates with beams, by sampling and
assisted. Each line is a comparison with what has to come out the same.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

from flashmark.integrations import huggingface

VOCABULARY, LENGTH, WINDOW, LANDMARKS = 61, 48, 8, 8
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = SPECIAL | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip


def llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, **SPECIAL
    )
    return transformers.GPT2LMHeadModel(config)


def qwen2() -> transformers.PreTrainedModel:
    """With the embedding as its output layer."""
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    )


MODELS = {"Llama": llama, "GPT-2": gpt2, "Qwen2": qwen2}
CONVERSIONS = {
    "nystrom": lambda model: huggingface.to_nystrom(model, LANDMARKS),
    "hybrid": lambda model: huggingface.to_hybrid(model, LANDMARKS, window=WINDOW),
}
ADAPTERS = {"Llama": ["q_proj", "v_proj"], "GPT-2": ["c_attn"], "Qwen2": ["q_proj", "v_proj"]}


def sequences(count: int, seed: int = 0) -> Tensor:
    """Random tokens whose second half repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(2, VOCABULARY, (count, LENGTH // 2), generator=generator)
    return torch.cat([half, half], 1)


def trainer(model: torch.nn.Module, folder: Path, steps: int) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    data = {n: [{"input_ids": x, "labels": x} for x in sequences(64, seed=n)] for n in (0, 1)}
    made = transformers.Trainer(model, arguments, train_dataset=data[0], eval_dataset=data[1])
    made.remove_callback(transformers.PrinterCallback)
    return made


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(ids, use_cache=False).logits


def difference(found: Tensor, wanted: Tensor) -> str:
    """The largest, relative to the largest entry."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5, error
    return f"{error:.0e}" if error else "identical"


def same_tokens(found: Tensor, wanted: Tensor) -> str:
    assert torch.equal(found, wanted)
    return "identical"


def sampled(model: torch.nn.Module, ids: Tensor, **options: object) -> Tensor:
    torch.manual_seed(7)
    return model.generate(ids, do_sample=True, **options)


def run(name: str, kind: str, steps: int = 50) -> Iterator[tuple[str, str]]:
    """(comparison, difference) of one model; raises AssertionError where it is not rounding."""
    torch.manual_seed(0)
    original, ids = MODELS[name]().eval(), sequences(2, seed=2)
    model = CONVERSIONS[kind](copy.deepcopy(original))
    if kind == "hybrid":
        near = ids[:, : 2 * WINDOW]
        yield "near tokens / original", difference(logits(model, near), logits(original, near))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training = trainer(model, folder, steps)
        before = training.evaluate()["eval_loss"]
        training.train()
        after = training.evaluate()["eval_loss"]
        decayed = {id(p) for p in training.optimizer.param_groups[0]["params"]}
        found = [p for name, p in model.named_parameters() if "landmarks" in name]
        assert found and not any(id(p) in decayed for p in found)
        fresh = trainer(copy.deepcopy(model), folder, steps).evaluate()["eval_loss"]
        assert after < before and abs(after - fresh) < 1e-5
        yield "loss, trained", f"{before:.3f} -> {after:.3f}"

        model.save_pretrained(folder / "model")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        yield "loaded / saved", difference(logits(loaded, ids), logits(model, ids))

        config = peft.LoraConfig(
            r=4, target_modules=ADAPTERS[name], modules_to_save=["landmarks"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = peft.get_peft_model(copy.deepcopy(loaded), config)
        trainer(adapted, folder, steps).train()
        adapted.save_pretrained(folder / "adapter")
        wanted = logits(adapted, ids)
        assert not torch.equal(wanted, logits(loaded, ids))
        again = peft.PeftModel.from_pretrained(copy.deepcopy(loaded), folder / "adapter")
        yield "adapter, loaded / saved", difference(logits(again, ids), wanted)
        yield "adapter, merged", difference(logits(again.merge_and_unload(), ids), wanted)

    prompt, options = ids[:1, :30], {"max_new_tokens": 24, "do_sample": False}
    greedy = model.generate(prompt, **options, use_cache=False)
    yield "greedy / no cache", same_tokens(model.generate(prompt, **options), greedy)
    beams = model.generate(prompt, **options, num_beams=4, use_cache=False)
    yield "beams / no cache", same_tokens(model.generate(prompt, **options, num_beams=4), beams)
    whole = sampled(model, prompt, max_new_tokens=24, use_cache=False)
    yield "sampling / no cache", same_tokens(sampled(model, prompt, max_new_tokens=24), whole)
    for helper, assistant in (("original", original), ("loaded", loaded)):
        assisted = model.generate(prompt, **options, assistant_model=assistant)
        yield f"assisted by {helper} / greedy", same_tokens(assisted, greedy)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| model | attention | comparison | difference |\n|---|---|---|---|")
    for name in MODELS:
        for kind in CONVERSIONS:
            for comparison, found in run(name, kind):
                print(f"| {name} | {kind} | {comparison} | {found} |", flush=True)


if __name__ == "__main__":
    main()
