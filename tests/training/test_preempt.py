"""A PREEMPT file stops a run as a signal does; a stop that takes too long is cut short."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.training import loop
from llmnorm.training.signals import StopRequest
from tests.distributed.processes import command
from tests.distributed.processes import run as run_processes
from tests.running import PATIENCE, SMOKE, Child, assert_same_run, metrics_of

WORDS = ["schedule=constant", "training.steps=6", "evaluation.samples=0"]
WORDS += ["evaluation.micro_batch=8", "checkpoint.every=2"]


def words(run: Path, data: Path, *more: str) -> list[str]:
    """The run, begun or gone on with."""
    if (run / "config.yaml").exists():
        return ["train", str(run), *more]
    return ["train", str(SMOKE), f"run_dir={run}", f"data.dir={data}", *WORDS, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """The run without a stop."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(words(run, smoke_data)) == 0
    return run


def drop(sign: Path, at: int) -> None:
    """From now on, the file is dropped when the step of this number is about to be taken.

    The step is taken when the thread has seen it, on the process that looks for it.
    """
    real = loop.step

    def step(run: Any, batches: Any, stop: StopRequest) -> Any:
        if run.progress.step == at - 1 and run.parallel.is_main:
            sign.touch()
            deadline = time.monotonic() + PATIENCE
            while not stop.exit_code and time.monotonic() < deadline:
                time.sleep(0.01)
        return real(run, batches, stop)

    loop.step = step


def test_a_dropped_file_stops_the_run_and_holds_it_until_it_is_removed(
    tmp_path: Path,
    smoke_data: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Oracle: by hand, and the run that was not stopped, to the bit."""
    run, sign = tmp_path / "run", tmp_path / "run" / "PREEMPT"
    monkeypatch.setattr(loop, "step", loop.step)
    drop(sign, 3)
    assert cli.main(words(run, smoke_data)) == 75
    said = capfd.readouterr().out
    assert said.endswith(
        f"stopped by a PREEMPT file at step 3 of 6, saved; go on with: llmnorm train {run}\n"
    )
    assert sign.read_text() == "3\n"  # the run's own by now, which holds nothing up

    sign.write_text("asked by the user\n")
    assert cli.main(words(run, smoke_data)) == 75
    err = capfd.readouterr().err
    assert err == (
        f"llmnorm: stopped before its first step by the file {sign}, which llmnorm has not "
        "written; remove it, and the same command starts the run\n"
    )
    assert sign.read_text() == "asked by the user\n"
    assert metrics_of(run)[-1]["step"] == 3
    assert cli.main([*words(run, smoke_data), "--dry-run"]) == 0  # which takes no step

    sign.write_text("3\n")  # as the run had left it
    assert cli.main(words(run, smoke_data)) == 0
    assert_same_run(run, whole, 6)
    assert not sign.exists() and (run / "DONE").exists()


def test_a_file_that_was_dropped_while_a_run_was_loaded_is_not_removed(
    tmp_path: Path, smoke_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run stops at it; here it comes between the look at the start and the steps."""
    run, sign = tmp_path / "run", tmp_path / "run" / "PREEMPT"
    real, seen = loop.prepare, []

    def prepare(*arguments: Any, **options: Any) -> Any:
        prepared = real(*arguments, **options)
        sign.touch()
        return prepared

    def step(prepared: Any, batches: Any, stop: StopRequest) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not stop.exit_code and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(sign.exists())
        return taken(prepared, batches, stop)

    taken = loop.step
    monkeypatch.setattr(loop, "prepare", prepare)
    monkeypatch.setattr(loop, "step", step)
    assert cli.main(words(run, smoke_data)) == 75
    assert seen == [True] and sign.read_text() == "1\n"


def dropping(directory: Path, rank: int, world: int, *, words: list[str], sign: Path) -> Any:
    """A scenario: the file is dropped in step 3."""
    drop(sign, 3)
    return command(directory, rank, world, words=words)


def hanging(directory: Path, rank: int, world: int, *, words: list[str], sign: Path) -> Any:
    """A scenario: the file is dropped in step 3, whose checkpoint the second process cannot end."""
    drop(sign, 3)
    real = Checkpoints.save

    def save(self: Checkpoints, step: int, *rest: Any) -> None:
        if rank and step == 3:
            threading.Event().wait()
        real(self, step, *rest)

    Checkpoints.save = save  # type: ignore[method-assign]
    return command(directory, rank, world, words=words)


def test_all_processes_stop_at_the_file_and_at_the_end_of_the_grace(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: both exit codes, the newest whole checkpoint, and a run that was not stopped. After
    the grace the second process may also find the first one gone."""
    runs = {}
    for name, scenario in (("a", command), ("b", dropping), ("c", hanging)):
        run = runs[name] = tmp_path / name
        more = ["parallel.sharding=ddp", *(["checkpoint.grace=1"] if name == "c" else [])]
        options = {} if name == "a" else {"sign": run / "PREEMPT"}
        scenario = partial(scenario, words=words(run, smoke_data, *more), **options)
        answers = run_processes(scenario, tmp_path / f"{name}.d")
        if name == "c":  # ended from a thread, so the scenario has no answer
            assert answers[0] == 75 and answers[1] in (74, 75)
        else:
            assert [code for code, *_ in answers] == ([0, 0] if name == "a" else [75, 75])
    assert (runs["b"] / "PREEMPT").read_text() == "3\n"
    said = (tmp_path / "c.d" / "err_0").read_text()
    assert (
        "llmnorm: stopped by a PREEMPT file; the step under way and its checkpoint took longer "
        "than checkpoint.grace (1 s) and are lost, those saved before are whole; go on with: "
        f"llmnorm train {runs['c']}\n"
    ) in said
    assert (runs["c"] / "PREEMPT").read_text() == ""  # still asks
    (runs["c"] / "PREEMPT").unlink()
    for name in ("b", "c"):
        more = ["checkpoint.grace=25"]
        scenario = partial(command, words=words(runs[name], smoke_data, *more))
        answers = run_processes(scenario, tmp_path / f"{name}.again")
        assert [code for code, *_ in answers] == [0, 0], answers
        step = 3 if name == "b" else 2
        assert f"going on from {runs[name]}/checkpoints/step_0000000{step}" in answers[0][2]
        assert_same_run(runs[name], runs["a"], 6)


def stuck() -> None:
    """In a child: the step of a stop never ends, as in a collective call without an answer."""
    real = loop.step

    def step(run: Any, batches: Any, stop: StopRequest) -> Any:
        if run.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return real(run, batches, stop)

    loop.step = step


def test_a_step_that_does_not_end_is_cut_short(
    tmp_path: Path, smoke_data: Path, whole: Path
) -> None:
    """Oracle: the exit code of SIGTERM, and the run that was not stopped."""
    run = tmp_path / "run"
    child = Child(words(run, smoke_data, "checkpoint.grace=0.5"), tmp_path / "log", before=stuck)
    assert child.finish() == 143, child.log.read_text()
    assert "stopped by SIGTERM; the step under way" in child.log.read_text()
    assert not (run / "PREEMPT").exists()
    assert cli.main(words(run, smoke_data, "checkpoint.grace=25")) == 0
    assert_same_run(run, whole, 6)
