"""`llmnorm finetune`: its defaults below a file, what the run keeps of them, and refused runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmnorm import cli
from llmnorm.commands import finetune
from llmnorm.config.file import load
from llmnorm.config.saved import to_tree
from llmnorm.config.tree import RunConfig
from tests.running import ROOT, SMOKE, assert_same_run, llmnorm, metrics_of

DEFAULTS = ROOT / "configs" / "finetune" / "defaults.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, run: Path, smoke_data: Path) -> Path:
    """The smoke text on top of the smoke run, without an optimizer and a schedule."""
    tree = yaml.safe_load(SMOKE.read_text())
    for section in ("tokenizer", "optimizer", "schedule"):
        del tree[section]
    tree["model"] = {"pretrained": str(run)}
    tree["data"]["dir"] = str(smoke_data)
    tree["training"] = {"steps": 2, "global_batch": 4}
    tree["evaluation"] = {"samples": 0}
    tree["objective"] = "causal_lm"  # the smoke text holds no conversations
    file = tmp_path_factory.mktemp("finetune") / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def settings_of(file: Path, *overrides: str) -> RunConfig:
    return load(file, overrides, below=finetune.BELOW).config


def without_objective(recipe: Path) -> Path:
    """The recipe, which then has the defaults' objective."""
    tree = yaml.safe_load(recipe.read_text())
    del tree["objective"]
    file = recipe.with_name("plain.yaml")
    file.write_text(yaml.safe_dump(tree))
    return file


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_defaults_are_those_that_are_promised(recipe: Path) -> None:
    """Oracle: the numbers, written out; 3 % of 200 steps are 6."""
    config = settings_of(recipe)
    optimizer = config.optimizer.model_dump()
    assert (config.optimizer.name, optimizer["lr"]) == ("adamw", 2e-4)
    assert (optimizer["betas"], optimizer["weight_decay"]) == ((0.9, 0.999), 0)
    assert optimizer["auxiliary"]["weight_decay"] == 0
    schedule: Any = config.schedule
    assert (schedule.name, schedule.warmup_steps(200)) == ("cosine", 6)
    assert config.adapter.name == "lora"
    config = settings_of(recipe, "objective=sft")
    assert settings_of(without_objective(recipe)) == config.model_copy(
        update={"run_dir": Path("runs/plain")}
    )


def test_the_file_its_base_and_overrides_are_put_over_them(recipe: Path) -> None:
    """Oracle: the same file with the defaults as the first of its `base`."""
    above = recipe.with_name("above.yaml")
    above.write_text("optimizer: {eps: 1e-7, lr: 5e-4}\nschedule: linear\n")
    tree = yaml.safe_load(recipe.read_text()) | {"optimizer": {"lr": 1e-3}}
    mine, named = recipe.with_name("mine.yaml"), recipe.with_name("named.yaml")
    mine.write_text(yaml.safe_dump(tree | {"base": "above.yaml"}))
    named.write_text(yaml.safe_dump(tree | {"base": [str(finetune.BELOW), "above.yaml"]}))
    for words in ([], ["optimizer.eps=1e-6"], ["optimizer=muon"], ["schedule.warmup=0"]):
        got = to_tree(settings_of(mine, *words))
        expected = to_tree(load(named, words).config)
        del got["run_dir"], expected["run_dir"]
        assert got == expected
    optimizer = settings_of(mine).optimizer.model_dump()
    assert (optimizer["lr"], optimizer["eps"], optimizer["betas"]) == (1e-3, 1e-7, (0.9, 0.999))
    changed = settings_of(mine, "optimizer=muon").optimizer.model_dump()
    assert changed["weight_decay"] == load(SMOKE, ["optimizer=muon"]).config.optimizer.weight_decay
    assert settings_of(mine).schedule.name == "linear"


def test_help_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file; other commands' help has no such text."""
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    assert capsys.readouterr().out.endswith(f"{DEFAULTS.read_text()}")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "defaults, below" not in capsys.readouterr().out


def test_a_run_holds_what_it_is_and_both_commands_go_on_with_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `train` of the file with the defaults as its `base`, without a pause."""
    whole, paused, other = (tmp_path / name for name in ("whole", "paused", "other"))
    named = recipe.with_name("named.yaml")
    named.write_text(f"base: [{finetune.BELOW}, {recipe}]\n")
    words = ["schedule=constant", "checkpoint.every=1"]
    llmnorm("train", named, *words, "training.steps=3", f"run_dir={whole}")
    llmnorm("finetune", recipe, *words, f"run_dir={paused}")
    llmnorm("finetune", recipe, *words, f"run_dir={other}")
    saved = (paused / "config.yaml").read_text()
    assert yaml.safe_load(saved)["optimizer"]["betas"] == [0.9, 0.999]
    assert "base" not in yaml.safe_load(saved)
    capsys.readouterr()
    for command in ("train", "finetune"):
        assert f"{paused} is finished (step 2)" in answer(capsys, command, paused)[1]
    llmnorm("train", paused, "training.steps=3")
    llmnorm("finetune", other, "training.steps=3")
    for run in (paused, other):
        assert_same_run_but_the_last_evaluation(run, whole)
        assert (run / "config.yaml").read_text() == saved.replace("steps: 2", "steps: 3")


def assert_same_run_but_the_last_evaluation(run: Path, whole: Path) -> None:
    """The steps' lines and the state; a run that was finished before has one evaluation more."""
    steps = [line for line in metrics_of(run) if "loss" in line]
    assert steps == [line for line in metrics_of(whole) if "loss" in line]
    (run / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    assert_same_run(run, whole, 3)


def test_what_is_refused(
    recipe: Path, run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line with the cure and exit code 2: a pretraining run, a model, no weights."""
    cure = f"llmnorm finetune CONFIG model.pretrained={run}"
    code, _, err = answer(capsys, "finetune", run)
    assert code == 2 and err.endswith(f"{cure}\n") and err.count("\n") == 1
    assert "began from random weights" in err
    code, _, err = answer(capsys, "finetune", exported)
    assert code == 2 and f"{exported} is no run; " in err and f"pretrained={exported}" in err
    code, _, err = answer(capsys, "finetune", SMOKE)
    assert code == 2 and "model.pretrained" in err and err.count("\n") == 1
    code, _, err = answer(capsys, "finetune", recipe, "optimizer.beta=3")
    assert code == 2 and "optimizer.beta: unknown key; did you mean 'betas'?" in err


def test_data_that_is_missing_is_prepared_by_the_command_that_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Oracle: the words, written out; `data` reads no defaults, so the objective is among them."""
    asked: list[str] = []
    from llmnorm.training import loop

    def train(*_: Any, data_command: str, **__: Any) -> int:
        asked.append(data_command)
        return 0

    monkeypatch.setattr(loop, "train", train)
    llmnorm("finetune", recipe, f"run_dir={tmp_path / 'run'}")
    llmnorm("train", recipe, f"run_dir={tmp_path / 'run'}")
    name = settings_of(recipe).objective.name
    words = f"llmnorm data {recipe} run_dir={tmp_path / 'run'}"
    assert asked == [f"{words} objective={name}", words]
