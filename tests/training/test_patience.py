"""`evaluation.patience`: a run ends early, keeps its best checkpoint, and counts across kills."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.config.file import load
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.runs import signs
from llmnorm.training import keeping, loop
from llmnorm.training.prepare import Prepared
from llmnorm.training.state import Progress
from tests.distributed.processes import command
from tests.distributed.processes import run as run_processes
from tests.running import SMOKE, assert_same_run, metrics_of

# Validation loss by step; patience 2 ends the run at 12.
LOSSES = {2: 5.0, 4: 4.0, 6: 4.5, 8: 3.5, 10: math.nan, 12: 3.7, 14: 3.9, 16: 3.6, 18: 3.4, 20: 3.3}
WORDS = ["training.steps=20", "evaluation.every=2", "evaluation.patience=2", "checkpoint.every=5"]
WORDS += ["schedule=constant", "evaluation.samples=0", "model.num_hidden_layers=1"]
WORDS += ["training.global_batch=4"]


class Killed(BaseException):
    """Stands for a kill: nothing of the run is written after it."""


@contextmanager
def losses(by_step: dict[int, float]) -> Iterator[pytest.MonkeyPatch]:
    """Inside, these are the validation losses."""
    found: list[Prepared] = []
    real_keep, real_evaluate = keeping.keep_evaluation, keeping.evaluate

    def keep(run: Prepared, *args: Any) -> int:
        found.append(run)
        return real_keep(run, *args)

    def evaluate(*args: Any, **keys: Any) -> dict[str, Any]:
        return real_evaluate(*args, **keys) | {"loss": by_step[found[-1].progress.step]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "keep_evaluation", keep)
        patch.setattr(keeping, "evaluate", evaluate)
        yield patch


def train(run: Path, data: Path, *words: str) -> int:
    """The run of `WORDS`, or `run` itself where it is there already."""
    again = (run / "config.yaml").exists()
    places = [f"run_dir={run}", f"data.dir={data}"]
    config = load(run if again else SMOKE, [*places, *(() if again else WORDS), *words]).config
    directory = run_directory.agree(config, going_on=again)
    return loop.train(config, directory, data_command="llmnorm data")


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    run = tmp_path_factory.mktemp("patience") / "run"
    with losses(LOSSES):
        assert train(run, smoke_data) == 0
    return run


def test_a_run_ends_after_as_many_evaluations_without_a_lower_loss(
    ended: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: LOSSES counted by hand; the best step was no interval's and is kept."""
    assert (ended / "DONE").read_text() == "12\nevaluation.patience\n"
    assert metrics_of(ended)[-1]["step"] == 12
    assert checkpoints_of(ended) == [8, 10, 12]
    assert Checkpoints(ended / "checkpoints").find("best").path.name == "step_00000008"
    counts = read_checkpoint(ended / "checkpoints" / "step_00000012").meta
    assert (counts["best_loss"], counts["best_step"], counts["not_better"]) == (3.5, 8, 2)
    # Asked again, it says why it has ended and what continues it.
    assert cli.main(["train", str(ended), f"data.dir={smoke_data}"]) == 0
    out = capsys.readouterr().out
    assert f"{ended} is finished (step 12; evaluation.patience has ended it early)\n" in out
    assert f"llmnorm train {ended} evaluation.patience=4 (null: to its last step)" in out


def test_why_it_ends_is_said(
    tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: LOSSES; nothing is claimed of a best checkpoint where none is kept or finite."""
    with losses(LOSSES):
        train(tmp_path / "a", smoke_data)
    out = capsys.readouterr().out
    assert "ended early, at step 12 of 20: 2 evaluations in a row without a lower validation" in out
    assert "loss than 3.5000 at step 8 (evaluation.patience=2); its best checkpoint is kept" in out
    with losses(dict.fromkeys(LOSSES, math.nan)):
        train(tmp_path / "b", smoke_data)
    out = capsys.readouterr().out
    assert "at step 4 of 20: 2 evaluations in a row without a finite validation loss (eval" in out
    assert "best checkpoint" not in out


@pytest.mark.parametrize(
    "where", ["step 7", "evaluate 8", "save 8", "loss 8", "evaluate 12", "end"]
)
def test_the_count_survives_a_kill(
    where: str, ended: Path, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the run that was not killed: state and metrics to the bit, counts, and the sign."""
    what, step = where.split() if " " in where else (where, "12")

    def kill_in(module: Any, name: str, when: Any) -> None:
        real = getattr(module, name)

        def killed(*args: Any, **keys: Any) -> Any:
            if when(*args):
                raise Killed
            return real(*args, **keys)

        patch.setattr(module, name, killed)

    run, number = tmp_path / "run", int(step)
    with losses(LOSSES) as patch, pytest.raises(Killed):
        if what == "step":
            kill_in(loop, "step", lambda run, *_: run.progress.step == number)
        elif what == "evaluate":
            kill_in(loop, "keep_evaluation", lambda run, *_: run.progress.step == number)
        elif what == "save":
            kill_in(keeping, "save", lambda run, *_: run.progress.step == number)
        elif what == "loss":
            kill_in(Checkpoints, "add_loss", lambda _, step, *__: step == number)
        else:
            kill_in(signs, "end", lambda *_: True)
        train(run, smoke_data)
    assert not (run / "DONE").exists()
    with losses(LOSSES):
        assert train(run, smoke_data) == 0
    assert_same_run(run, ended, 12)
    assert (run / "DONE").read_text() == "12\nevaluation.patience\n"
    counts, expected = (
        Progress.of(read_checkpoint(path / "checkpoints" / "step_00000012").meta)
        for path in (run, ended)
    )
    times = {"seconds": 0.0}
    assert asdict(counts) | times == asdict(expected) | times
    assert Checkpoints(run / "checkpoints").find("best").path.name == "step_00000008"


@pytest.mark.parametrize(
    ("word", "sign"),
    [
        ("evaluation.patience=4", "16\nevaluation.patience\n"),  # 2 were counted before
        ("evaluation.patience=null", "20\n"),
        ("training.steps=30", "16\nevaluation.patience\n"),  # 2 are given again
        ("training.steps=14", "14\n"),
    ],
)
def test_it_goes_on_where_more_is_asked_for(
    word: str, sign: str, ended: Path, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: LOSSES counted by hand, from the checkpoint at the early end."""
    run = shutil.copytree(ended, tmp_path / "run")
    with losses(LOSSES):
        assert train(run, smoke_data, word) == 0
        assert (run / "DONE").read_text() == sign
        before = metrics_of(run)
        assert train(run, smoke_data, word) == 0  # and is finished then
    assert metrics_of(run) == before and (run / "DONE").read_text() == sign


def test_a_branch_counts_its_own_evaluations(ended: Path, tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: by hand: 4.2 is its own lowest loss, though its parent had 3.5."""
    branch = f"training.branch_from={ended / 'checkpoints' / 'step_00000012'}"
    run = tmp_path / "run"
    with losses({14: 4.2, 16: 4.3, 18: 4.4}):
        assert train(run, smoke_data, branch) == 0
    assert (run / "DONE").read_text() == "18\nevaluation.patience\n"


def test_an_equal_loss_is_not_a_lower_one_and_a_step_counts_once() -> None:
    """Oracle: by hand."""
    progress = Progress(step=2)
    progress.count_evaluation(3.0)
    assert (progress.best_loss, progress.best_step, progress.not_better) == (3.0, 2, 0)
    for step, loss in ((4, 3.0), (4, 2.0), (6, math.inf), (8, 3.0)):
        progress.step = step
        progress.count_evaluation(loss)
    assert (progress.best_loss, progress.best_step, progress.not_better) == (3.0, 2, 3)


def test_a_checkpoint_of_before_there_were_counts_is_read() -> None:
    """Oracle: the counts of a run that has no evaluation yet."""
    meta = {k: 7 for k in ("step", "row", "tokens", "skipped_steps", "skipped_in_a_row", "seconds")}
    assert Progress.of(meta) == Progress(7, 7, 7, 7, 7, seconds=7)


def test_patience_needs_evaluations() -> None:
    """Oracle: the key, and the one that is missing."""
    with pytest.raises(InputError, match=r"evaluation.patience 2 counts .* evaluation.every"):
        load(SMOKE, ["evaluation.patience=2", "evaluation.every=null"])


def impatient(directory: Path, rank: int, world: int, *, words: list[str]) -> Any:
    """A scenario: a command on every process, with losses that get no lower."""
    with losses({2: 3.0, 4: 3.0, 6: 4.0}):
        return command(directory, rank, world, words=words)


def test_two_processes_end_together(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: by hand: the second evaluation without a lower loss is that of step 6."""
    run = tmp_path / "run"
    words = ["train", str(SMOKE), f"run_dir={run}", f"data.dir={smoke_data}", *WORDS]
    answers = run_processes(partial(impatient, words=words), tmp_path / "both")
    assert [code for code, *_ in answers] == [0, 0], answers
    assert (run / "DONE").read_text() == "6\nevaluation.patience\n"
    assert checkpoints_of(run) == [2, 5, 6] and metrics_of(run)[-1]["step"] == 6
