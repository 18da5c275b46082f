"""`llmnorm eval`: its figures are the run's own; lm-eval's tasks, adapters, several processes."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from llmnorm import cli
from tests.distributed.processes import command
from tests.distributed.processes import run as run_processes
from tests.running import ROOT, SMOKE, llmnorm


def last_evaluation(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["validation"] for line in lines if "validation" in line][-1]


def mistake(capsys, *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("data: ")]
    assert len(said) == 1, said
    return said[0]


def write_task(directory: Path) -> Path:
    """A copy of the shipped task: six questions whose right answers are "a a b b a b"."""
    directory.mkdir()
    shipped = ROOT / "tests" / "data" / "tasks"
    data = directory / "questions.jsonl"
    shutil.copy(shipped / "weather.jsonl", data)
    task = directory / "weather.yaml"
    text = (shipped / "weather.yaml").read_text()
    task.write_text(text.replace("tests/data/tasks/weather.jsonl", str(data)))
    return task


def test_a_run_gives_the_figures_of_its_own_last_evaluation(run, capsys) -> None:
    """Oracle: metrics.jsonl, to the last digit; raw weights and moving average."""
    whole = last_evaluation(run)
    average = whole.pop("ema")
    llmnorm("eval", run)
    written = json.loads((run / "eval" / "step_00000012.json").read_text())
    assert written["validation"] == whole and written["step"] == 12
    printed = capsys.readouterr().out
    assert f"{whole['bits_per_byte']:.4f}" in printed and "step_00000012.json" in printed
    assert all(name in printed for name in whole["sources"])
    llmnorm("eval", run, "--ema")
    written = json.loads((run / "eval" / "step_00000012-ema.json").read_text())
    assert written["validation"] == average != whole


def test_figures_that_cannot_be_written_are_printed_first(run, tmp_path, capsys) -> None:
    """Oracle: the table of the same evaluation, where a file stands in the directory's place."""
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "eval", ignore_errors=True)
    (copy / "eval").touch()
    capsys.readouterr()
    assert cli.main(["eval", str(copy)]) == 2
    said = capsys.readouterr()
    assert f"{last_evaluation(run)['bits_per_byte']:.4f}" in said.out
    (line,) = said.err.splitlines()
    assert "cannot be written: File exists; the figures stand above" in line


def test_a_checkpoint_is_chosen_by_its_step(run) -> None:
    """Oracle: the evaluation that the run made at that step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    there = next(x["validation"] for x in lines if "validation" in x and x["step"] == 4)
    llmnorm("eval", run, "--checkpoint", "4", "--batch-size", "5")
    written = json.loads((run / "eval" / "step_00000004.json").read_text())
    assert written["validation"]["loss"] == pytest.approx(there["loss"], rel=1e-6)


def test_an_exported_directory_needs_its_text_named(
    run, exported, smoke_data, tmp_path, capsys
) -> None:
    """Oracle: the run's figures, through its tokenizer as a directory; and one-line errors."""
    said = mistake(capsys, "eval", exported)
    assert "name the text by --data CONFIG_OR_RUN" in said
    assert "need --data" in mistake(capsys, "eval", exported, "data.seed=1")
    assert "--limit: counts examples of --tasks" in mistake(capsys, "eval", run, "--limit", "3")
    assert "eval reads the sections data," in mistake(capsys, "eval", run, "model.norm=layer")
    wide = tmp_path / "wide.yaml"
    wide.write_text(
        f"base: {SMOKE}\ndata: {{dir: {smoke_data}, context_length: 300}}\n"
        "model: {max_position_embeddings: 512}\n"
    )
    longer = mistake(capsys, "eval", exported, "--data", wide)
    assert "more than the model's 256 positions" in longer
    llmnorm("eval", exported, "--data", run, "--batch-size", "16")
    written = json.loads((exported / "eval.json").read_text())
    assert written["validation"]["loss"] == pytest.approx(last_evaluation(run)["loss"], rel=1e-6)


def test_other_data_than_the_run_was_trained_on_is_refused(run, tmp_path, capsys) -> None:
    """Oracle: the message; one of the two sources is left out."""
    source = "data.sources=[{name: prose, path: tests/data/text/prose.jsonl}]"
    said = mistake(capsys, "eval", run, f"data.dir={tmp_path}", source)
    assert "was trained on the data" in said and "name it by --data" in said


def test_two_processes_give_the_same_figures(run, tmp_path) -> None:
    """Oracle: one process; sums are taken in float64, so 1e-6 is far above their rounding."""
    words = ["eval", str(run), "training.device=cpu", "parallel.sharding=ddp"]
    first, second = run_processes(partial(command, words=words), tmp_path / "launch")
    assert (first[0], second[0]) == (0, 0), first
    assert (first[1] + second[1]).count("written to") == 1
    found = json.loads((run / "eval" / "step_00000012.json").read_text())["validation"]
    whole = last_evaluation(run)
    assert found["sources"].keys() == whole["sources"].keys()
    for key in ("loss", "bits_per_byte"):
        assert found[key] == pytest.approx(whole[key], rel=1e-6)


def test_a_local_task_is_scored_by_the_models_own_logits(run, tmp_path, capsys) -> None:
    """Oracle: log-probabilities of both answers, summed by hand from the model's logits."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from llmnorm.exchange.loading import load_model

    task = write_task(tmp_path / "tasks")
    model, tokenizer = load_model(run)
    right = 0
    for line in (tmp_path / "tasks" / "questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        scores = []
        for answer in ("the sun came out", "rain fell"):
            prompt = tokenizer(question["question"])["input_ids"]
            whole = tokenizer(f"{question['question']} {answer}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            )
        right += scores.index(max(scores)) == question["answer"]
    for where, limit in ((task, []), (task.parent, []), (task, ["--limit", "2"])):
        llmnorm("eval", run, "--tasks", where, *limit)
        found = json.loads((run / "eval" / "step_00000012.json").read_text())["tasks"]
        if not limit:
            assert found["results"]["weather"]["acc,none"] == pytest.approx(right / 6)
            assert found["n-samples"]["weather"]["effective"] == 6
        else:
            assert found["n-samples"]["weather"]["effective"] == 2
    assert "weather" in capsys.readouterr().out
    assert math.isclose(found["results"]["weather"]["acc,none"] * 2 % 1, 0)


def test_tasks_that_are_not_there_are_one_line(run, tmp_path, capsys) -> None:
    """Oracle: the messages."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    said = mistake(capsys, "eval", run, "--tasks", tmp_path / "none.yaml")
    assert "there is no file" in said
    assert "holds no task" in mistake(capsys, "eval", run, "--tasks", tmp_path)
    task = write_task(tmp_path / "tasks")
    (tmp_path / "tasks" / "questions.jsonl").unlink()
    assert "questions.jsonl" in mistake(capsys, "eval", run, "--tasks", task)


def test_an_adapter_is_evaluated_on_top(run, exported, tmp_path, capsys) -> None:
    """Oracle: a fresh LoRA changes nothing; one with weights does; both files lie beside it."""
    peft = pytest.importorskip("peft", reason="the extra finetune is not installed")
    from llmnorm.exchange.loading import load_model

    assert "no adapter_config.json" in mistake(capsys, "eval", run, "--adapter", tmp_path)
    config = tmp_path / "adapter_config.json"
    for content, what in (("[]", "got a list"), ("{}", "adapter_model.safetensors: there is no")):
        config.write_text(content, encoding="utf-8")
        assert what in mistake(capsys, "eval", run, "--adapter", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert "does not fit the model" in mistake(capsys, "eval", run, "--adapter", tmp_path)
    model, _ = load_model(exported)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    losses = []
    for name in ("fresh", "trained"):
        if name == "trained":
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(tmp_path / name)
        llmnorm("eval", run, "--adapter", tmp_path / name)
        written = json.loads((tmp_path / name / "eval.json").read_text())
        losses.append(written["validation"]["loss"])
    assert losses[0] == pytest.approx(last_evaluation(run)["loss"], rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-3
