"""Signals before the first step, in steps and in evaluations; what a step's save promises."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.parallel import leaving, processes
from llmnorm.parallel.processes import Parallel
from llmnorm.training import keeping
from llmnorm.training.signals import EXIT_CODES, StopRequest, agreed
from tests.distributed.processes import command
from tests.distributed.processes import run as run_processes
from tests.running import SMOKE, assert_same_run, metrics_of

WORDS = ["schedule=constant", "training.steps=6", "evaluation.every=3", "evaluation.samples=1"]
WORDS += ["evaluation.sample_tokens=2", "evaluation.micro_batch=4"]


def train(run: Path, data: Path, *words: str) -> int:
    """The run, begun or gone on with."""
    given = [str(run)] if run.exists() else [str(SMOKE), f"run_dir={run}", f"data.dir={data}"]
    return cli.main(["train", *given, *([] if run.exists() else WORDS), *words])


@contextmanager
def at_poll(number: int, do: Callable[[], None]) -> Iterator[None]:
    """Inside, `do` is done before the batch of this number (from 1) of all evaluations."""
    real, calls = Parallel.poll, [0]

    def poll(self: Parallel) -> None:
        calls[0] += 1
        if calls[0] == number:
            do()
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "poll", poll)
        yield


def saved(run: Path) -> dict[int, float | None]:
    """The checkpoints' steps and their validation losses."""
    found = sorted((run / "checkpoints").glob("step_*"))
    metas = [read_checkpoint(path).meta for path in found]
    return {meta["step"]: meta["validation_loss"] for meta in metas}


def samples_of(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """The run without a stop."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(run, smoke_data) == 0
    return run


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_before_the_first_step_ends_the_process_with_a_line(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Oracle: the exit status and the output of a forked process."""
    log = tmp_path / "log"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        with StopRequest("before its first step"):
            signal.raise_signal(number)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_CODES[number]
    assert log.read_text() == f"llmnorm: stopped by {number.name} before its first step\n"


def test_signals_are_noted_and_the_first_one_counts() -> None:
    """Oracle: by hand; the handlers of before are back afterwards."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    with StopRequest() as stop:
        assert (stop.exit_code, stop.name) == (0, "")
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert (stop.exit_code, stop.name) == (75, "SIGUSR1")
    assert {number: signal.getsignal(number) for number in EXIT_CODES} == before


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nohup's own setting."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not stop.exit_code
        with StopRequest("at once"):  # nor does it end what has not begun to train
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("own", "total", "code"),
    [(0, 0, 0), (143, 143, 143), (0, 75, 75), (0, 286, 143), (75, 218, 75), (0, 205, 143)],
)
def test_processes_agree_on_a_code(own: int, total: int, code: int) -> None:
    """Oracle: by hand; the sum of the processes' codes is all that each knows of the others."""
    assert agreed(own, total) == code


@pytest.mark.parametrize("every", ["null", "3"])
@pytest.mark.parametrize("poll", [2, "samples", "last"])
def test_an_evaluation_is_left_at_once_and_made_when_the_run_goes_on(
    tmp_path: Path,
    smoke_data: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    every: str,
    poll: int | str,
) -> None:
    """Oracle: the run that was not stopped, to the bit; its lines, its samples, its losses."""
    counts = polls_of(smoke_data, tmp_path)
    number = {"samples": counts, "last": counts + 2}.get(str(poll), poll)
    step = 6 if poll == "last" else 3
    run = tmp_path / "run"
    with at_poll(int(number), partial(signal.raise_signal, signal.SIGTERM)):
        assert train(run, smoke_data, f"checkpoint.every={every}") == 143
    said = capsys.readouterr().out
    left = " (its evaluation is left)" if step == 6 else ""
    assert said.endswith(
        f"stopped by SIGTERM at step {step} of 6, saved{left}; go on with: llmnorm train {run}\n"
    )
    assert (run / "PREEMPT").read_text() == f"{step}\n" and step in saved(run)
    assert [line["step"] for line in metrics_of(run) if "validation" in line] == [3][: step // 6]
    assert train(run, smoke_data) == 0
    assert_same_run(run, whole, 6)
    assert samples_of(run) == samples_of(whole)
    assert saved(run)[6] == saved(whole)[6] and (run / "DONE").exists()
    if step in saved(run):
        validation = [x for x in metrics_of(run) if "validation" in x and x["step"] == step]
        assert saved(run)[step] == validation[0]["validation"]["loss"]


def test_the_length_in_steps_is_told_where_it_was_given_in_tokens(
    tmp_path: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand: 5,000 tokens in steps of 16 rows of 64 are 5 steps."""
    words = ["training.steps=null", "training.tokens=5000"]
    with at_poll(1, partial(signal.raise_signal, signal.SIGHUP)):
        assert train(tmp_path / "run", smoke_data, *words) == 143
    assert "stopped by SIGHUP at step 3 of 5, saved; go on" in capsys.readouterr().out


def test_a_chart_gets_the_evaluation_that_was_left_and_nothing_twice(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: metrics.jsonl, through TensorBoard's own reader."""
    pytest.importorskip("tensorboard", reason="needs the extra track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, words = tmp_path / "run", ["logging.trackers=[tensorboard]", "checkpoint.every=3"]
    with at_poll(2, partial(signal.raise_signal, signal.SIGTERM)):
        assert train(run, smoke_data, *words) == 143
    assert train(run, smoke_data) == 0
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in reader.Scalars("validation/loss")] == [3, 6]


def polls_of(data: Path, place: Path) -> int:
    """How often an evaluation polls, its one sample included."""
    calls = [0]

    def count(self: Parallel) -> None:
        calls[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "poll", count)
        assert train(place / "counted", data, "training.steps=1") == 0
    return calls[0]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill(*_: object, **__: object) -> None:
    raise Killed


@pytest.mark.parametrize("point", ["evaluation", "samples", "metrics", "loss"])
def test_a_kill_in_the_last_evaluation_loses_nothing(
    tmp_path: Path, smoke_data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Oracle: the run that was not stopped; killed in the evaluation, between its two lines, and
    before the checkpoint gets its loss."""
    run = tmp_path / "run"
    words = ["evaluation.every=null"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        match point:
            case "evaluation":
                patch.setattr(keeping, "evaluate", kill)
            case "samples":
                patch.setattr(keeping.Metrics, "log_evaluation", kill)
            case "metrics":
                real = keeping.Metrics._write
                patch.setattr(
                    keeping.Metrics,
                    "_write",
                    lambda self, line: kill() if "validation" in line else real(self, line),
                )
            case "loss":
                patch.setattr(Checkpoints, "add_loss", kill)
        train(run, smoke_data, *words)
    assert saved(run) == {6: None}
    assert train(run, smoke_data) == 0
    expected = [line for line in metrics_of(whole) if line["step"] == 6]
    assert [line for line in metrics_of(run) if line["step"] == 6] == expected
    assert samples_of(run) == [line for line in samples_of(whole) if line["step"] == 6]
    assert saved(run) == {6: expected[-1]["validation"]["loss"]}
    before = metrics_of(run)
    assert train(run, smoke_data) == 0 and metrics_of(run) == before


def test_the_best_checkpoint_is_kept_though_its_loss_comes_later(
    tmp_path: Path, smoke_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand; the two newest, and the lowest of the losses that the evaluations give."""
    losses = iter([5.0, 3.0, 4.0, 4.0, 6.0])
    real = keeping.evaluate

    def evaluate(*args: Any, **options: Any) -> dict[str, Any]:
        return {**real(*args, **options), "loss": next(losses)}

    monkeypatch.setattr(keeping, "evaluate", evaluate)
    run = tmp_path / "run"
    each = ["checkpoint.every=1", "evaluation.every=1", "training.steps=5", "evaluation.samples=0"]
    assert train(run, smoke_data, *each) == 0
    assert saved(run) == {2: 3.0, 4: 4.0, 5: 6.0}


def test_weights_are_back_in_place_after_an_average_was_not_evaluated_to_the_end(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the run with the same average that was not stopped."""
    words = ["training.ema=0.5", "evaluation.samples=0"]
    assert train(tmp_path / "a", smoke_data, *words) == 0
    half = polls_of(smoke_data, tmp_path) - 1
    with at_poll(half + 2, partial(signal.raise_signal, signal.SIGINT)):
        assert train(tmp_path / "b", smoke_data, *words) == 130
    assert train(tmp_path / "b", smoke_data) == 0
    assert_same_run(tmp_path / "b", tmp_path / "a", 6)


def asked(directory: Path, rank: int, world: int, *, words: list[str]) -> Any:
    """A scenario: the second of the processes is asked to stop in its first evaluation."""
    processes.POLLED = 2
    with at_poll(3 if rank else 10**9, partial(signal.raise_signal, signal.SIGUSR1)):
        return command(directory, rank, world, words=words)


def test_all_processes_leave_an_evaluation_after_the_same_batch(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: both exit codes, and two processes that were not stopped."""
    answers = {}
    for name, scenario in (("a", command), ("b", asked)):
        words = ["train", str(SMOKE), f"run_dir={tmp_path}/{name}", f"data.dir={smoke_data}"]
        words += [*WORDS, "parallel.sharding=ddp", "training.micro_batch=8"]
        answers[name] = run_processes(partial(scenario, words=words), tmp_path / f"{name}.d")
    assert [code for code, *_ in answers["a"]] == [0, 0]
    assert [code for code, *_ in answers["b"]] == [75, 75]
    assert "stopped by SIGUSR1 at step 3 of 6, saved" in answers["b"][0][1]
    words = ["train", f"{tmp_path}/b"]
    again = run_processes(partial(command, words=words), tmp_path / "again")
    assert [code for code, *_ in again] == [0, 0]
    assert_same_run(tmp_path / "b", tmp_path / "a", 6)


def dying(directory: Path, rank: int, world: int, *, words: list[str]) -> Any:
    """A scenario: the second process is killed in the evaluation."""
    if rank:
        with at_poll(2, partial(os.kill, os.getpid(), signal.SIGKILL)):
            return command(directory, rank, world, words=words)
    return command(directory, rank, world, words=words)


def test_the_loss_of_a_process_is_a_line_and_a_code_of_its_own(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: kill -9 of one of two processes; 74, one line, the step before it saved."""
    words = ["train", str(SMOKE), f"run_dir={tmp_path}/run", f"data.dir={smoke_data}"]
    words += [*WORDS, "parallel.sharding=ddp", "checkpoint.every=3"]
    first, second = run_processes(partial(dying, words=words), tmp_path / "d")
    assert second == -signal.SIGKILL
    code, _, err = first
    errors = [line for line in err.split("\n") if line.startswith("llmnorm: error: ")]
    assert code == 74, err
    assert len(errors) == 1 and errors[0].startswith("llmnorm: error: rank 1 (host "), err
    assert "not heard of" in errors[0] and "in phase" in errors[0]
    assert "Traceback" not in err
    assert 3 in saved(tmp_path / "run")


def failing(directory: Path, rank: int, world: int, *, words: list[str]) -> Any:
    """A scenario: one process alone finds that it has no memory, in the evaluation."""
    leaving.LEAVING = timedelta(seconds=1)

    def fail() -> None:
        raise MemoryError

    with at_poll(2 if rank else 10**9, fail):
        return command(directory, rank, world, words=words)


def test_a_process_that_fails_alone_does_not_leave_the_others_waiting(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: both end, long before the half hour of a collective call; each says its part."""
    words = ["train", str(SMOKE), f"run_dir={tmp_path}/run", f"data.dir={smoke_data}"]
    words += [*WORDS, "parallel.sharding=ddp"]
    began = time.monotonic()
    first, second = run_processes(partial(failing, words=words), tmp_path / "d")
    assert time.monotonic() - began < 600
    said = [(tmp_path / "d" / f"err_{rank}").read_text() for rank in range(2)]
    # Its own call fails when the other has gone, or its heartbeat ends it before that.
    code = first if isinstance(first, int) else first[0]
    assert code == 74, first
    assert second[0] == 2, said
    assert "llmnorm: error: rank 1 (host " in said[0] and "out of memory" in said[1]
