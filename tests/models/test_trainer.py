"""transformers' Trainer and PEFT on our classes: what they look for, find and write."""

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import find_labels

from llmnorm.models import (
    LlmNormConfig,
    LlmNormForCausalLM,
    LlmNormForMaskedLM,
    LlmNormForSequenceClassification,
)
from llmnorm.models.building import build_model
from llmnorm.models.recomputed import recomputable
from llmnorm.nn import block as blocks
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.part import InputError

HEADS = [LlmNormForCausalLM, LlmNormForMaskedLM, LlmNormForSequenceClassification]
IDS = torch.randint(0, 61, (6, 9), generator=torch.Generator().manual_seed(7))
each_head = pytest.mark.parametrize("head", HEADS)
MIXERS = ["softmax", "nala", "gated_delta", ["nala", "softmax"]]


def build(head: Any = LlmNormForCausalLM, **keys: Any) -> Any:
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    mixer = {"name": "softmax", "bidirectional": head is not LlmNormForCausalLM}
    names = {"mixer": mixer, "architectures": [head.__name__]}
    return build_model(LlmNormConfig(**shape | heads | names | keys), seed=0)


def rows(head: Any) -> list[dict[str, Any]]:
    labels = IDS if head is not LlmNormForSequenceClassification else torch.arange(6) % 2
    return [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, labels, strict=True)]


def arguments(place: Path, **keys: Any) -> TrainingArguments:
    common: dict[str, Any] = {"max_steps": 4, "report_to": [], "use_cpu": True, "seed": 1}
    common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    common |= {"learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(place), **common | keys)


@each_head
def test_labels_are_found(head: Any) -> None:
    """Oracle: the one name of every stock class; Trainer evaluates by it."""
    assert find_labels(head) == ["labels"]


@each_head
def test_evaluation_gives_a_loss_and_calls_the_metrics(head: Any, tmp_path: Path) -> None:
    """Oracle: the model's own loss and logits on the same rows."""
    model, seen = build(head), []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found)
        return {"shown": 1.0}

    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows(head), compute_metrics=metrics)
    figures = trainer.evaluate()
    labels = torch.stack([row["labels"] for row in rows(head)])
    with torch.no_grad():
        output = model.eval()(IDS, labels=labels)
    assert figures["eval_shown"] == 1
    assert figures["eval_loss"] == pytest.approx(float(output.loss), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions), output.logits)
    assert torch.equal(torch.from_numpy(seen[0].label_ids), labels)


@each_head
def test_the_best_model_is_loaded_at_the_end_and_a_run_resumes(head: Any, tmp_path: Path) -> None:
    """Oracle: the lowest loss of the log; the weights of a run that was not stopped."""
    keys: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    keys |= {"save_steps": 2, "logging_steps": 1}
    data = {"train_dataset": rows(head), "eval_dataset": rows(head)}
    best = arguments(tmp_path / "best", load_best_model_at_end=True, **keys)
    trainer = Trainer(build(head), best, **data)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    whole = Trainer(build(head), arguments(tmp_path / "whole", **keys), **data)
    whole.train()
    again = Trainer(build(head), arguments(tmp_path / "whole", **keys), **data)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_predictions_and_smoothed_labels_have_logits(tmp_path: Path) -> None:
    """Oracle: the shape of all logits; a smoothed loss, which Trainer makes of them, that falls."""
    keys = arguments(tmp_path, label_smoothing_factor=0.1, logging_steps=1, max_steps=6)
    trainer = Trainer(build(), keys, train_dataset=rows(LlmNormForCausalLM))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    predictions = trainer.predict(rows(LlmNormForCausalLM)).predictions
    assert predictions.shape == (6, 9, 61)


def test_shifted_labels_win(tmp_path: Path) -> None:
    """Oracle: the loss of the shifted labels alone (context parallelism passes both)."""
    model = build()
    shifted = IDS.roll(-1, 1)
    alone = model(IDS, shift_labels=shifted)
    both = model(IDS, labels=IDS, shift_labels=shifted)
    assert torch.equal(alone.loss, both.loss) and torch.equal(alone.logits, both.logits)
    assert not torch.equal(model(IDS, labels=IDS).loss, alone.loss)


def gradients(model: Any, **inputs: Any) -> list[Tensor]:
    """Loss, gradients and buffers of a step, with dropout's numbers from one seed."""
    torch.manual_seed(3)
    loss = model(IDS, labels=IDS, **inputs).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for norm in (module for module in model.modules() if isinstance(module, RunningNorm)):
        norm.commit()
    return found + [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("norm", ["rms", {"name": "power", "groups": 1}])
def test_recomputed_gradients_are_those_without(norm: Any, mixer: Any, reentrant: bool) -> None:
    """Oracle: loss, gradients, dropout and statistics, to the bit; a norm counts once."""
    keys = {"norm": norm, "mixer": mixer, "dropout": 0.2}
    if norm != "rms":
        keys |= {"norm": {**norm, "allow_leak": True}}
    plain = gradients(build(**keys).train())
    model = build(**keys).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    for one, other in zip(gradients(model), plain, strict=True):
        assert torch.equal(one, other)
    model.activation_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in model.model.layers)


def test_every_nth_layer_is_recomputed() -> None:
    """Oracle: the layers by hand."""
    model = build(num_hidden_layers=5)
    model.activation_checkpointing_enable(every_n_layers=2)
    switches = [block.gradient_checkpointing for block in model.model.layers]
    assert switches == [True, False, True, False, True]


@each_head
def test_trainer_with_gradient_checkpointing(head: Any, tmp_path: Path) -> None:
    """Oracle: the weights of a training without it."""
    found = []
    for switch in (False, True):
        set_seed(0)
        keys = arguments(tmp_path, gradient_checkpointing=switch)
        trainer = Trainer(build(head).train(), keys, train_dataset=rows(head))
        trainer.train()
        assert trainer.model.is_activation_checkpointing == switch
        found.append(list(trainer.model.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_adapter_with_gradient_checkpointing(reentrant: bool) -> None:
    """Oracle: the adapter's gradients without it; the frozen weights have none."""
    found = []
    for switch in (False, True):
        set_seed(0)
        model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        if switch:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        found.append(gradients(model))
        assert model.base_model.model.model.embed_tokens.weight.grad is None
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_an_adapter_around_a_mixers_norm(kind: str) -> None:
    """Oracle: the model without the adapter, which begins as it; a norm must not be passed by."""
    model = build(mixer={"name": "nala", "norm": kind}).double().eval()
    expected = model(IDS).logits
    wrapped = get_peft_model(model, LNTuningConfig(target_modules=["self_attn.norm"]))
    torch.testing.assert_close(wrapped(input_ids=IDS).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_prefix_tuning_is_refused_by_name(training: bool) -> None:
    """Oracle: the cure; PEFT fills a cache of its own class, also inside `generate`."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build(), config).train(training)
    with pytest.raises(InputError, match="prompt tuning"):
        if training:
            model(input_ids=IDS, labels=IDS)
        else:
            model.generate(input_ids=IDS, max_new_tokens=2)


def test_the_collator_of_packed_rows() -> None:
    """Oracle: each row alone; the collator's own names, numbers of documents among them."""
    model = build(mixer=["nala", "softmax"]).double().eval()
    features = [{"input_ids": ids[: 3 + n].tolist()} for n, ids in enumerate(IDS[:3])]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(features)
    logits = model(**batch).logits[0].split([3, 4, 5])
    for got, feature in zip(logits, features, strict=True):
        alone = model(torch.tensor([feature["input_ids"]])).logits[0]
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "labels", "loss"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2, 1, 1, 0, 2]), torch.nn.CrossEntropyLoss()),
        ({"num_labels": 1}, torch.linspace(-1, 1, 6), torch.nn.MSELoss()),
        ({"num_labels": 3}, torch.rand(6, 3).round(), torch.nn.BCEWithLogitsLoss()),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.rand(6, 3).round().long(),
            torch.nn.BCEWithLogitsLoss(),
        ),
        ({"num_labels": 2, "problem_type": "regression"}, torch.rand(6, 2), torch.nn.MSELoss()),
        ({"num_labels": 1, "problem_type": "regression"}, torch.rand(6, 1), torch.nn.MSELoss()),
    ],
)
def test_every_problem_type(keys: Any, labels: Tensor, loss: Any) -> None:
    """Oracle: torch's own loss of the logits, float64, and its sum over the items given."""
    model = build(LlmNormForSequenceClassification, **keys).double().eval()
    output = model(IDS, labels=labels)
    logits, wanted = output.logits, labels
    if not isinstance(loss, torch.nn.CrossEntropyLoss):
        wanted = labels.view_as(logits).double()
    torch.testing.assert_close(output.loss, loss(logits, wanted), rtol=1e-12, atol=0)
    count = labels.numel()
    items = model(IDS, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(items, output.loss / 2, rtol=1e-12, atol=0)


def test_labels_of_another_shape_are_refused() -> None:
    """Oracle: the shape that the problem's type wants."""
    model = build(LlmNormForSequenceClassification, num_labels=3)
    refused = partial(pytest.raises, ValueError)
    with refused(match=r"'multi_label_classification'.*\(6, 3\), got \(6, 2\)"):
        model(IDS, labels=torch.rand(6, 2))
    with refused(match=r"'single_label_classification'.*\(6,\), got \(6, 1\)"):
        model(IDS, labels=torch.zeros(6, 1, dtype=torch.long))


def test_a_whole_model_is_pickled_and_copied(tmp_path: Path) -> None:
    """Oracle: the logits; a model is handed to other processes so."""
    model = build(placement="post").eval()
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_every_block_can_be_recomputed() -> None:
    """Oracle: transformers' class, by which its tools find the layers; one of another package."""

    class Mine(blocks.PreBlock):
        """A block of another package."""

    found = [cls for cls in vars(blocks).values() if isinstance(cls, type)]
    placements = [cls for cls in found if issubclass(cls, blocks.Block) and cls is not blocks.Block]
    settings = LlmNormConfig(vocab_size=61, hidden_size=24, num_attention_heads=4).settings()
    for cls in [*placements, Mine]:
        block = recomputable(cls(settings, 0))
        assert isinstance(block, GradientCheckpointingLayer) and isinstance(block, cls)
        assert type(block).__name__ == cls.__name__
