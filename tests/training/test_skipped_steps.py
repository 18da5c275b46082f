"""A step whose loss or gradient is not finite is skipped; how a run ends and resumes after it."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.config.file import load
from llmnorm.exchange.loading import load_model
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.training import loop
from llmnorm.training.prepare import Prepared
from llmnorm.training.signals import EXIT_CODES
from tests.distributed.processes import command
from tests.distributed.processes import run as run_processes
from tests.running import SMOKE, assert_same_run, metrics_of, state_of
from tests.training.test_spike import larger

CONSTANT = ("schedule=constant", "evaluation.samples=0", "training.max_skipped_steps=3")


@contextmanager
def not_finite(*steps: int, also: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, the gradient norm of these steps (from 1) is nan, and `also` is done in them."""
    real_step, real_clip, bad = loop.step, Parallel.clip, [False]

    def step(run: Prepared, *args: Any) -> Any:
        bad[0] = run.progress.step + 1 in steps
        try:
            return real_step(run, *args)
        finally:
            bad[0] = False

    def clip(self: Parallel, *args: Any) -> Any:
        norm = real_clip(self, *args)
        if bad[0]:
            also()
        return norm * float("nan") if bad[0] else norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", step)
        patch.setattr(Parallel, "clip", clip)
        yield


def train(run: Path, data: Path, *words: str) -> int:
    """The smoke run, or `run` itself where it is there already."""
    again = run.exists()
    places = [f"run_dir={run}", f"data.dir={data}"]
    config = load(run if again else SMOKE, [*places, *(() if again else CONSTANT), *words]).config
    directory = run_directory.agree(config, going_on=again)
    return loop.train(config, directory, data_command="llmnorm data")


def signs(run: Path) -> dict[str, int]:
    """Which of the files that say how a run ended are there, and the step in each."""
    names = ("DONE", "PREEMPT", "DIVERGED")
    return {name: int((run / name).read_text()) for name in names if (run / name).exists()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """8 steps without a stop, the fourth of them skipped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with not_finite(4):
        assert train(run, smoke_data, "training.steps=8") == 0
    return run


def test_a_skipped_step_leaves_the_weights(tmp_path: Path, smoke_data: Path, whole: Path) -> None:
    """Oracle: the checkpoint of the step before it; the run that was not stopped."""
    run = tmp_path / "run"
    with not_finite(4):
        assert train(run, smoke_data, "training.steps=4", "checkpoint.every=1") == 0
    assert signs(run) == {"DONE": 4}
    line = next(line for line in metrics_of(run) if line["step"] == 4)
    assert line["grad_norm"] is None and line["not_finite"] == {"grad_norm": "nan"}
    before, after = state_of(run, 3), state_of(run, 4)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    meta = read_checkpoint(run / "checkpoints" / "step_00000004").meta
    assert (meta["step"], meta["skipped_steps"], meta["skipped_in_a_row"]) == (4, 1, 1)
    # The end's evaluation is of weights that were not changed: it is what the checkpoint goes by.
    validation = [line["validation"] for line in metrics_of(run) if "validation" in line][-1]
    assert meta["validation_loss"] == validation["loss"]
    assert train(run, smoke_data, "training.steps=8") == 0
    assert signs(run) == {"DONE": 8}
    ours, theirs = state_of(run, 8), state_of(whole, 8)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    assert [line for line in metrics_of(run) if "loss" in line and line["step"] != 4] == [
        line for line in metrics_of(whole) if "loss" in line and line["step"] != 4
    ]


def test_a_checkpoint_is_not_due_at_an_interval_after_a_skipped_step(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the names of the checkpoints; the second step is skipped."""
    with not_finite(2):
        train(tmp_path / "run", smoke_data, "training.steps=3", "checkpoint.every=1")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert names == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize(("number", "code"), EXIT_CODES.items())
def test_a_signal_in_a_skipped_step_saves(
    tmp_path: Path,
    smoke_data: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    """Oracle: the run that was not stopped, to the bit."""
    run = tmp_path / "run"
    with not_finite(4, also=partial(signal.raise_signal, number)):
        assert train(run, smoke_data, "training.steps=8") == code
    assert signs(run) == {"PREEMPT": 4}
    name = signal.Signals(number).name
    assert capsys.readouterr().out == (
        f"stopped by {name} at step 4 of 8, saved; go on with: llmnorm train {run}\n"
    )
    assert train(run, smoke_data) == 0
    assert_same_run(run, whole, 8)


@pytest.mark.parametrize(("last", "asynchronous"), [(6, "false"), (8, "true")])
def test_a_run_that_gives_up_saves_its_last_good_weights(
    tmp_path: Path, smoke_data: Path, last: int, asynchronous: str
) -> None:
    """Oracle: the checkpoint of before the skipped steps; in the second case the run's last step
    is among them."""
    run = tmp_path / "run"
    words = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.every=1"]
    with not_finite(last - 2, last - 1, last), pytest.raises(InputError) as error:
        train(run, smoke_data, "training.steps=8", *words)
    assert signs(run) == {"DIVERGED": last}
    saved = run / "checkpoints" / f"step_{last:08d}"
    message = str(error.value)
    rows = f"{16 * (last - 3)}-{16 * last - 1}"
    assert f"stopped at step {last}: 3 steps in a row" in message and f"rows {rows}" in message
    assert f"saved in {saved}" in message and "\n" not in message
    before, after = state_of(run, last - 3), state_of(run, last)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    load_model(run)  # what commands that read a run do
    # The command of the message, the rate filled in.
    command = message.partition("llmnorm train ")[2].replace("LOWER", "1e-4").split()
    assert cli.main(["train", *command, f"data.dir={smoke_data}", "training.steps=12"]) == 0
    lines = (tmp_path / "run-2" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == last + 1 and json.loads(lines[0])["lr"] == 1e-4
    # It is not taken for a finished one, and goes on with the rows that follow.
    if last == 8:
        with pytest.raises(InputError, match="up to 8, had a non-finite loss .*training.steps="):
            train(run, smoke_data)
        assert signs(run) == {"DIVERGED": 8}
    with not_finite(last + 1, last + 2):  # three tries again
        assert train(run, smoke_data, "training.steps=11") == 0
    assert signs(run) == {"DONE": 11}


@pytest.mark.parametrize("every", [1, 100])
def test_weights_that_an_update_has_spoilt_are_not_saved(
    tmp_path: Path, smoke_data: Path, every: int
) -> None:
    """Oracle: the names of the checkpoints. The learning rate is finite and makes the first update
    overflow; nothing is sampled where the loss is nan, which multinomial would refuse."""
    words = ["optimizer.lr=1e38", "training.steps=9", "evaluation.every=1", "evaluation.samples=1"]
    with pytest.raises(InputError) as error:
        train(tmp_path / "run", smoke_data, *words, f"checkpoint.every={every}")
    assert "has spoilt the weights, which are not saved" in str(error.value)
    assert signs(tmp_path / "run") == {"DIVERGED": 4}
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    # The update itself was finite: its checkpoint cannot be known to be bad when it is due.
    assert names == (["step_00000001"] if every == 1 else [])
    kept = "; newest checkpoint: " if every == 1 else "; no checkpoint; start again"
    assert kept in str(error.value)


def test_a_run_of_skipped_steps_alone_has_nothing_to_save(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: the empty list of checkpoints."""
    with not_finite(1, 2, 3), pytest.raises(InputError, match="nothing was trained before them"):
        train(tmp_path / "run", smoke_data, "training.steps=9", "checkpoint.every=1")
    assert signs(tmp_path / "run") == {"DIVERGED": 3}
    assert not (tmp_path / "run" / "checkpoints").exists()


def skipping(directory: Path, rank: int, world: int, *, words: list[str], steps: list[int]) -> Any:
    """A scenario: a command on every process, these steps skipped."""
    with not_finite(*steps):
        return command(directory, rank, world, words=words)


def leaping(directory: Path, rank: int, world: int, *, words: list[str]) -> Any:
    """A scenario: a command on every process, and in which steps it has updated its weights.

    Step 8 is a spike on the second process alone, step 9 on both.
    """
    updated, real = [], loop.step

    def step(run: Prepared, *args: Any) -> Any:
        updated.append(real(run, *args))
        return updated[-1]

    loop.step = step
    with larger({8: 1000.0, 9: 1000.0} if rank else {9: 1000.0}):
        answer = command(directory, rank, world, words=words)
    return [*answer, [outcome.updated for outcome in updated]]


@pytest.mark.parametrize("sharding", ["ddp", "zero1"])
def test_two_processes_give_up_together(tmp_path: Path, smoke_data: Path, sharding: str) -> None:
    """Oracle: exit code, sign and checkpoint of one process, and a resumed run that ends.

    The resumed run is one of spikes too, which the processes judge together.
    """
    if sharding != "ddp":
        pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    run = tmp_path / "run"
    words = ["train", str(SMOKE), f"run_dir={run}", f"data.dir={smoke_data}", *CONSTANT]
    words += ["training.steps=5", "checkpoint.every=1", f"parallel.sharding={sharding}"]
    words += ["training.spike={sigma: 50, window: 8}"]  # judges from four finite steps on
    scenario = partial(skipping, words=words, steps=[3, 4, 5])
    answers = run_processes(scenario, tmp_path / "first")
    assert [code for code, *_ in answers] == [3, 3], answers
    assert signs(run) == {"DIVERGED": 5}
    before, after = state_of(run, 2), state_of(run, 5)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    words = ["train", str(run), "training.steps=9"]
    answers = run_processes(partial(leaping, words=words), tmp_path / "second")
    assert [code for code, *_ in answers] == [0, 0], answers
    assert signs(run) == {"DONE": 9}
    # What only one process holds for a spike is none; what process 0 does is one for all.
    assert [answer[-1] for answer in answers] == [[True, True, True, False]] * 2
    before, after = state_of(run, 8), state_of(run, 9)
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
