"""The objective that learns a teacher's distributions: in the loop, in evaluation, in commands."""

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data.loader import Loader, evaluation_batches
from llmnorm.exchange.loading import load_model
from llmnorm.models import LlmNormConfig
from llmnorm.models.building import build_model
from llmnorm.part import InputError
from tests.running import ROOT, SMOKE, assert_same_run, llmnorm, metrics_of

DRAFT = ["objective.name=distill", "model.num_hidden_layers=1", "model.initializer_range=0.1"]
DRAFT += ["training.steps=6", "evaluation.every=3", "checkpoint.every=3"]
NEAR = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "agreement", "acceptance"), 1e-5)


@pytest.fixture(scope="module")
def words(run: Path, smoke_data: Path) -> list[str]:
    """A draft of one layer for the smoke run."""
    return [str(SMOKE), *DRAFT, f"objective.teacher={run}", f"data.dir={smoke_data}"]


@pytest.fixture(scope="module")
def draft(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft of 6 steps, evaluated and saved at 3 and 6."""
    place = tmp_path_factory.mktemp("distill") / "draft"
    llmnorm("train", *words, f"run_dir={place}")
    return place


def refused(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    """The message of a command that must end with exit code 2; one line."""
    capsys.readouterr()
    assert cli.main([str(word) for word in command]) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("llmnorm: error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("llmnorm: error: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["objective.teacher=null"], "objective.teacher"),
        (["model.mixer=hydra"], "'hydra' looks at later tokens .* 'distill'"),
        (["optimizer.lr=auto"], "optimizer.lr: auto: the Step Law .* 'distill'"),
        (
            ["adapter=lora", "adapter.targets=[lm_head]", "model=null"],
            "adapter.targets: 'distill' .* leave lm_head out",
        ),
        (["objective.techer=x"], "did you mean 'teacher'"),
    ],
)
def test_what_makes_no_sense_is_refused(run, words, more: list[str], message: str) -> None:
    """Oracle: the message, one line."""
    base = [f"model.pretrained={run}"] if "model=null" in more else []
    with pytest.raises(InputError, match=message) as error:
        load(SMOKE, [*words[1:], *more, *base])
    assert "\n" not in str(error.value)


def by_hand(draft: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums over a batch's labels, from full logits in float64: loss, agreement, acceptance, 1."""
    with torch.no_grad():
        own, other = (
            model.double()(batch["input_ids"], position_ids=batch["position_ids"]).logits
            for model in (draft, teacher)
        )
    real = batch["shift_labels"] != -100
    own, other = own[real], other[real]
    q, p = own.softmax(-1), other.softmax(-1)
    loss = F.cross_entropy(own, p, reduction="sum")
    agreed = (own.argmax(-1) == other.argmax(-1)).sum()
    return torch.stack([loss, agreed, q.minimum(p).sum(), real.sum()])


def test_losses_and_figures_are_those_of_full_logits_in_float64(draft: Path, run: Path) -> None:
    """Oracle: the first step's rows and the last evaluation's, summed by hand from the two models;
    the figures against the text are those of causal_lm, to the last bit."""
    config = load(draft).config
    objective = config.objective.build(config, alone=True, command="")
    trained, teacher = load_model(draft)[0], load_model(run)[0]
    first = build_model(LlmNormConfig.from_dict(trained.config.to_dict()), seed=config.seed)
    (batch,) = next(Loader(objective.data, seed=config.seed, global_batch=16).batches())
    sums = by_hand(first.eval(), teacher, batch)
    lines = metrics_of(draft)
    assert lines[0]["loss"] == pytest.approx(float(sums[0] / sums[3]), rel=1e-6)
    assert lines[0]["tokens"] == sums[3]
    figures = lines[-1]["validation"]
    for index, source in enumerate(objective.data.sources):
        batches = evaluation_batches(objective.data, index, micro_batch=7)
        sums = torch.stack([by_hand(trained, teacher, batch) for batch in batches]).sum(0)
        there = figures["sources"][source.name]
        assert there["agreement"] == pytest.approx(float(sums[1] / sums[3]), abs=2 / float(sums[3]))
        assert there["acceptance"] == pytest.approx(float(sums[2] / sums[3]), rel=1e-5)
    for key in ("agreement", "acceptance"):
        means = {name: found[key] for name, found in figures["sources"].items()}
        assert figures[key] == pytest.approx(objective.data.mean(means), rel=1e-12)
        assert 0 < figures[key] < 1
    # In place of causal_lm's own evaluation: the same weights as its run.
    other = draft.parent / "text"
    shutil.copytree(draft, other)
    text = (other / "config.yaml").read_text()
    changed = re.sub(
        r"^objective:\n  name: distill\n  teacher: .*$", "objective: causal_lm", text, flags=re.M
    )
    assert changed != text
    (other / "config.yaml").write_text(changed)
    llmnorm("eval", other)
    found = json.loads((other / "eval" / "step_00000006.json").read_text())["validation"]
    assert found["loss"] == figures["loss"]
    assert found["bits_per_byte"] == figures["bits_per_byte"] and "agreement" not in found


def test_a_model_that_is_its_teacher_accepts_all(run, words, tmp_path: Path) -> None:
    """Oracle: the same weights on both sides; the loss of training is then their entropy, and its
    gradient 0."""
    more = ["model=null", f"model.pretrained={run}", "tokenizer=null", "training.steps=1"]
    more += ["optimizer.lr=0.0", "evaluation.every=1", "checkpoint.every=null"]
    llmnorm("train", *words, *more, f"run_dir={tmp_path / 'same'}")
    step, evaluation = metrics_of(tmp_path / "same")
    assert step["grad_norm"] < 1e-6
    assert evaluation["validation"]["agreement"] == 1
    assert evaluation["validation"]["acceptance"] == pytest.approx(1, abs=1e-6)


def test_neither_cut_nor_kill_changes_a_run(draft: Path, words, start, tmp_path: Path) -> None:
    """Oracle: the run in one piece; its losses in other micro-batches, every bit after a kill."""
    place = tmp_path / "cut"
    more = ["training.micro_batch=4", "evaluation.micro_batch=3"]
    llmnorm("train", *words, *more, f"run_dir={place}")
    for one, other in zip(metrics_of(draft), metrics_of(place), strict=True):
        for key in ("loss", "grad_norm") if "loss" in one else ():
            assert one[key] == pytest.approx(other[key], rel=1e-5)
        for key, within in NEAR.items() if "validation" in one else ():
            assert one["validation"][key] == pytest.approx(other["validation"][key], rel=within)
    place = tmp_path / "killed"
    for _ in range(10):  # on a busy machine the run may end before it is seen at its fifth line
        child = start("train", *words[:-1], f"run_dir={place}")
        while child.process.is_alive() and lines_in(place) < 5:  # a checkpoint, and a step behind
            time.sleep(0.005)
        child.process.kill()
        code = child.finish()
        if code == -signal.SIGKILL:
            break
        assert code == 0, child.log.read_text()
        shutil.rmtree(place)
    assert code == -signal.SIGKILL
    assert start("train", *words[:-1], f"run_dir={place}").finish() == 0
    assert_same_run(place, draft, 6)


def lines_in(place: Path) -> int:
    path = place / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def going_on(run: Path, draft: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the teacher and of the draft, which learns from that copy."""
    teacher, copied = tmp_path / "teacher", tmp_path / "draft"
    shutil.copytree(run, teacher)
    shutil.copytree(draft, copied)
    (copied / "DONE").unlink()
    llmnorm("train", copied, f"objective.teacher={teacher}", "training.steps=7")
    return teacher, copied


def test_a_run_goes_on_with_its_own_teacher_alone(going_on, capsys, tmp_path: Path) -> None:
    """Oracle: the checkpoint's record; a teacher that is gone, moved, trained further, or another.
    One line each, and no step is taken with another one."""
    teacher, draft = going_on
    named = record(draft)
    assert named["path"] == str(teacher / "checkpoints" / "step_00000012")
    # Trained further: what is read is the step that the checkpoint names.
    llmnorm("train", teacher, "training.steps=13")
    llmnorm("train", draft, "training.steps=8")
    assert record(draft) == named
    # Moved: found again where the setting says, and finished runs are told too.
    moved = teacher.rename(tmp_path / "moved")
    message = refused(capsys, "train", draft, "training.steps=9")
    cure = f"if it was moved: llmnorm train {draft} objective.teacher=NEW"
    assert message == f"objective.teacher: {teacher}, the teacher of this run, is not there; {cure}"
    message = refused(capsys, "train", draft, f"objective.teacher={moved}")
    assert "holds other weights than the teacher of this run" in message
    assert named["hash"] in message and "\n" not in message
    step = moved / "checkpoints" / "step_00000012"
    llmnorm("train", draft, f"objective.teacher={step}")
    assert load(draft).config.objective.teacher == step
    # Its figures without it, with a note.
    shutil.rmtree(moved)
    capsys.readouterr()
    llmnorm("eval", draft)
    found = json.loads((draft / "eval" / "step_00000008.json").read_text())["validation"]
    assert "note: no figures beside the teacher: objective.teacher: " in capsys.readouterr().err
    assert "agreement" not in found and found["loss"] == last(draft)["loss"]


def record(draft: Path) -> dict[str, str]:
    """What the newest checkpoint says of the teacher."""
    newest = max((draft / "checkpoints").glob("step_*"))
    return json.loads((newest / "MANIFEST.json").read_text())["meta"]["teacher"]


def last(draft: Path) -> dict[str, Any]:
    """The figures of the last evaluation."""
    return [line for line in metrics_of(draft) if "validation" in line][-1]["validation"]


def test_a_teacher_that_cannot_be_is_refused(
    run: Path, masked: Path, words, capsys, tmp_path: Path
) -> None:
    """Oracle: the message, before a step is taken."""
    place = f"run_dir={tmp_path / 'none'}"
    for more, part in (
        (["objective.teacher=nowhere"], "objective.teacher: there is no directory nowhere"),
        ([f"objective.teacher={masked}"], "a draft is distilled on a causal language model"),
        (["data.context_length=256", "model.max_position_embeddings=512"], None),
        (["data.context_length=512", "model.max_position_embeddings=512"], "has 256 positions"),
        (["tokenizer.vocab_size=500"], "has another tokenizer: .* add tokenizer.path="),
        (["model.vocab_size=600"], "has 512 rows in its head, the run's model 600; add model.voc"),
    ):
        data = [f"data.dir={tmp_path / 'data'}"] if part is None or "tokens" in part else []
        command = ["train", *words, *data, *more, place, "--dry-run"]
        if part is None:
            llmnorm(*command)
        else:
            assert re.search(part, refused(capsys, *command))
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").glob("*.jsonl"))


def test_the_commands_read_a_draft(draft: Path, run: Path, tmp_path: Path, capsys) -> None:
    """Oracle: the run's own figures, to the last digit; the teacher's path in what is exported."""
    llmnorm("eval", draft)
    found = json.loads((draft / "eval" / "step_00000006.json").read_text())["validation"]
    assert found == last(draft)
    llmnorm("export", draft, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"learned the distributions of {run}" in card
    llmnorm("plot", draft)
    assert (draft / "plots" / "loss.png").is_file()


def test_the_recipes_are_a_pair() -> None:
    """Oracle: the draft's teacher is where the target's run goes; the same rows and tokens."""
    target, draft = (
        load(ROOT / f"configs/recipes/exspec/{name}.yaml").config for name in ("target", "draft")
    )
    assert draft.objective.teacher == target.run_dir
    assert (draft.data, draft.tokenizer) == (target.data, target.tokenizer)
    assert draft.model.num_hidden_layers == 1 < target.model.num_hidden_layers
