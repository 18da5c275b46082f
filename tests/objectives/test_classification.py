"""Fine-tuning to classes and numbers, from encoders and decoders, in the same loop."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data.examples import Fields, open_examples
from llmnorm.data.order import Order
from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from tests.running import assert_same_run, llmnorm, metrics_of, state_of

CONFIG = Path("configs/finetune/smoke.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.validation_bytes=7"], "data.validation_bytes: a classification reads objective"),
        (["data.dir=elsewhere"], "data.dir: a classification reads"),
        (["objective.regression=true", "objective.labels=[a, b]"], "a regression has none"),
        (["objective.labels=[a]"], "at least two, each given once"),
        (["objective.labels=[a, b, a]"], "at least two, each given once"),
        (["evaluation.prompts=[a]"], "which 'classification' cannot"),
        (["objective.text_fields=x"], "unknown key; did you mean 'text_field'"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    """Oracle: the message, one line."""
    with pytest.raises(InputError, match=message) as error:
        load(CONFIG, words)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def classes(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs on top of the masked one."""
    run = tmp_path_factory.mktemp("classes") / "run"
    words = [f"model.pretrained={masked}", "training.epochs=2", "training.micro_batch=4"]
    llmnorm("train", CONFIG, *words, "checkpoint.every=8", f"run_dir={run}")
    return run


def examples(run: Path):
    objective = load(run).config.objective
    fields = Fields(objective.text_field, objective.pair_field, objective.label_field)
    return open_examples(
        objective.train,
        objective.validation,
        fields,
        classes=None,
        regression=objective.regression,
        tokenizer=run / "tokenizer",
        context_length=64,
    )


def test_the_losses_are_those_of_single_examples(classes: Path, masked: Path) -> None:
    """Oracle: the first step's examples and the validation file, one by one, in float64."""
    found = examples(classes)
    model, _ = load_model(classes)
    model = model.double()

    def losses(table, rows) -> list[tuple[float, bool]]:
        scored = []
        for row in rows:
            with torch.no_grad():
                logits = model(torch.tensor([table.ids[row]])).logits[0]
            label = torch.tensor(table.labels[row])
            scored.append((float(F.cross_entropy(logits, label)), logits.argmax() == label))
        return scored

    lines = metrics_of(classes)
    figures, scored = lines[-1]["validation"], losses(found.validation, range(24))
    assert figures["loss"] == pytest.approx(sum(x for x, _ in scored) / 24, rel=1e-5)
    assert figures["accuracy"] == sum(bool(hit) for _, hit in scored) / 24 > 0.8
    assert figures["sources"]["validation"]["f1"] == figures["f1"]
    assert found.rows == 64 and lines[-1]["step"] == 16
    # The first step: weights of the masked run and a fresh head.
    from llmnorm.models.building import build_model

    model = build_model(model.config, seed=0).double()
    old = state_of(masked, 6)
    base = {name: t for name, t in old.items() if name.startswith("model.model.")}
    missing, unexpected = model.load_state_dict(
        {name.removeprefix("model."): t for name, t in base.items()}, strict=False
    )
    assert sorted(missing) == ["pooler.bias", "pooler.weight", "score.bias", "score.weight"]
    assert not unexpected
    _, rows = Order([64], [64], 0).locate(0, 8)
    first = losses(found.train, rows)
    assert lines[0]["loss"] == pytest.approx(sum(x for x, _ in first) / 8, rel=1e-5)
    assert lines[0]["tokens"] == sum(len(found.train.ids[row]) for row in rows)


def test_the_commands_work_or_say_why_not(classes: Path, tmp_path: Path, capsys) -> None:
    """Oracle: the run's own figures; the exported model's classes by name; one line a refusal."""
    whole = metrics_of(classes)[-1]["validation"]
    llmnorm("eval", classes)
    found = json.loads((classes / "eval" / "step_00000016.json").read_text())
    assert found["validation"] == whole
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("accuracy", "f1", "matthews"))
    exported = tmp_path / "exported"
    llmnorm("export", classes, exported)
    assert "AutoModelForSequenceClassification" in (exported / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(exported)
    assert model.config.id2label == {0: "sale", 1: "walk"}
    text = "Day 12 Oda bought 9 rope at 7"
    ids = AutoTokenizer.from_pretrained(exported)(text)["input_ids"]
    ours, tokenizer = load_model(classes)
    asked = torch.tensor([[*ids, tokenizer.eos_token_id]])
    torch.testing.assert_close(model(asked).logits, ours(asked).logits)
    assert model.config.id2label[int(model(asked).logits.argmax())] == "sale"
    llmnorm("eval", exported, "--data", CONFIG, "--batch-size", "5")
    found = json.loads((exported / "eval.json").read_text())["validation"]
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    capsys.readouterr()
    for words, part in (
        (["generate", classes], "text is continued by a causal language model"),
        (["inspect", exported], "its figures are of a causal language model"),
        (["data", classes], "a classification reads its files when it starts"),
        (
            ["eval", exported, "--data", "configs/smoke.yaml"],
            "has another objective than the model",
        ),
    ):
        assert cli.main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line


def test_a_run_goes_on_to_the_same_numbers(classes: Path, masked: Path, tmp_path: Path) -> None:
    """Oracle: the run without a stop, to the bit."""
    run = tmp_path / "run"
    words = [f"model.pretrained={masked}", "training.micro_batch=4", "checkpoint.every=8"]
    llmnorm("train", CONFIG, *words, "training.epochs=2", f"run_dir={run}")
    for path in (run / "checkpoints").glob("step_00000016"):
        path.rename(tmp_path / "gone")  # as if it had been killed before
    (run / "DONE").unlink()
    llmnorm("train", run)
    assert_same_run(run, classes, 16)


def test_numbers_of_pairs_from_a_decoder(run: Path, tmp_path: Path) -> None:
    """Oracle: the mean squared error example by example, and its scores."""
    fields = ["objective.pair_field=other", "objective.label_field=score"]
    words = [f"model.pretrained={run}", "objective.regression=true", "training.epochs=1"]
    llmnorm("train", CONFIG, *words, *fields, f"run_dir={tmp_path}/run")
    figures = metrics_of(tmp_path / "run")[-1]["validation"]
    found = examples(tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    assert model.config.num_labels == 1 and model.model.causal
    with torch.no_grad():
        values = [float(model(torch.tensor([ids])).logits) for ids in found.validation.ids]
    error = F.mse_loss(torch.tensor(values).double(), torch.from_numpy(found.validation.labels))
    assert figures["loss"] == pytest.approx(float(error), rel=1e-4)
    assert -1 <= figures["pearson"] <= 1 and -1 <= figures["spearman"] <= 1


def test_without_a_tokenizer_it_says_so(tmp_path: Path, capsys) -> None:
    """Oracle: the message; nothing is written."""
    assert cli.main(["train", str(CONFIG), f"run_dir={tmp_path}/run"]) == 2
    assert "give one, or model.pretrained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
