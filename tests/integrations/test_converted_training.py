"""Training of converted models: the Trainer, checkpointing, low-rank adapters."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from flashmark import landmark_parameter_groups  # noqa: E402
from tests.integrations.test_converted import (  # noqa: E402
    KINDS,
    WINDOW,
    build,
    changed,
    close,
    each_kind,
    landmarks,
    logits,
    tokens,
)

pytestmark = [pytest.mark.plain_empty, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)


@each_kind
@pytest.mark.parametrize("length", [1, 2 * WINDOW, 2 * WINDOW + 1, 20])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_parameter_has_a_gradient(name, length, kind):
    model = KINDS[kind](build(name))
    model(tokens(2, length), use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    used = kind == "nystrom" or length > 2 * WINDOW
    if length > 1:  # one token reads its own value, whatever its landmarks
        assert all(bool(p.grad.any()) == used for p in landmarks(model).values())


@each_kind
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(use_reentrant, kind):
    plain, ids = KINDS[kind](build("qwen2")), tokens(2, 20)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for each in (plain, model):
        each.train()(ids, use_cache=False).logits.square().sum().backward()
    found = dict(model.named_parameters())
    # a reentrant checkpoint runs first without gradients, by other C++ operators
    rounding = 1e-5 if use_reentrant else 0.0
    most = max(float(p.grad.abs().max()) for p in plain.parameters())
    for name, p in plain.named_parameters():  # some are 0 but for rounding, as of biases of keys
        assert float((found[name].grad - p.grad).abs().max()) <= rounding * most, name


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        logging_strategy="no", **options,
    )  # fmt: skip


@each_kind
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_trainer_decays_no_landmarks(name, kind, tmp_path):
    pytest.importorskip("accelerate")
    model = KINDS[kind](build(name))
    trainer = transformers.Trainer(model, arguments(tmp_path, weight_decay=0.1, save_strategy="no"))
    decayed, spared = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    found = {id(p) for p in landmarks(model).values()}
    assert found <= {id(p) for p in spared["params"]}
    ours = landmark_parameter_groups(copy.deepcopy(model), 0.1)
    assert len(ours[1]["params"]) == len(found)


def test_the_trainer_evaluates_saves_and_goes_on(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = KINDS["hybrid"](build("llama")), tokens(8, 20)
    data = [{"input_ids": x, "labels": x} for x in ids]
    options = {"save_steps": 3, "learning_rate": 1e-2}

    def train(model, steps, **resume):
        trainer = transformers.Trainer(
            model, arguments(tmp_path, max_steps=steps, **options), train_dataset=data,
            eval_dataset=data,
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train(**resume)
        return before, trainer.evaluate()["eval_loss"]

    before, after = train(model, 6)
    assert after < before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    _, resumed = train(again, 6, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed == pytest.approx(after, abs=1e-4)
    assert close(logits(again.eval(), ids), logits(model.eval(), ids), 1e-3)


def adapters(**options):
    peft = pytest.importorskip("peft")
    return peft, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


@each_kind
@pytest.mark.parametrize("base", ["converted-again", "saved-converted"])
def test_adapters_train_and_keep_the_landmarks(base, kind, tmp_path):
    peft, config = adapters(modules_to_save=["landmarks"], task_type="CAUSAL_LM")
    plain = build("llama")
    if base == "saved-converted":
        changed(KINDS[kind](plain))
    plain.save_pretrained(tmp_path / "base")

    def loaded():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        return model if landmarks(model) else KINDS[kind](model)

    model, ids = peft.get_peft_model(loaded(), config), tokens(2, 20)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("landmarks" in name for name in trained) == 2
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    step.step()
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(), tmp_path / "adapter").eval()
    assert close(logits(again, ids), wanted)
    with again.disable_adapter():
        assert close(logits(again, ids), logits(loaded(), ids))
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    uncached = again.generate(**options, use_cache=False)
    assert torch.equal(again.generate(**options), uncached)
    merged = again.merge_and_unload()
    assert close(logits(merged, ids), wanted) and len(landmarks(merged)) == 2


def test_adapters_without_landmarks_leave_them_as_they_are(tmp_path):
    """Two conversions of a model begin with the same landmarks, whatever ran before."""
    peft, config = adapters(init_lora_weights=False)
    model, ids = peft.get_peft_model(KINDS["nystrom"](build("llama")), config), tokens(2, 20)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = build("llama")
    torch.randn(9)
    again = peft.PeftModel.from_pretrained(KINDS["nystrom"](base), tmp_path).eval()
    assert close(logits(again, ids), logits(model.eval(), ids))


@pytest.mark.parametrize(
    ("name", "kind"), [("Llama", "nystrom"), ("GPT-2", "hybrid"), ("Qwen2", "hybrid")]
)
def test_the_example(name, kind):
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    from examples import converted_model

    found = dict(converted_model.run(name, kind, steps=4))
    assert found["beams / no cache"] == "identical"
    assert ("near tokens / original" in found) == (kind == "hybrid")
