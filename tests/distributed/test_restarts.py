"""Runs under torchrun and accelerate launch that restart, are stopped, or are killed themselves.

In most tests the launcher and its workers are forked (launchers.py); the last ones are the real
commands.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llmnorm import cli
from llmnorm.training import keeping, loop
from tests.distributed.launchers import (
    Torchrun,
    alive,
    children,
    kill_self,
    life,
    python,
    steps_in,
    wait_until,
)
from tests.running import PATIENCE, ROOT, SMOKE, assert_same_run, metrics_of

WORDS = ["schedule=constant", "training.steps=6", "evaluation.samples=0", "checkpoint.every=2"]
WORDS += ["evaluation.micro_batch=8"]
LONG = ["training.steps=100000", "checkpoint.every=20", "evaluation.every=null"]
ONE = ["--standalone", "--nproc-per-node", "1", "--max-restarts", "5"]


def words(run: Path, data: Path, *more: str) -> list[str]:
    return ["train", str(SMOKE), f"run_dir={run}", f"data.dir={data}", *WORDS, *more]


def at_step(number: int, do: Any) -> None:
    """From now on `do(run, stop)` is called before the step of this number."""
    real = loop.step

    def step(run: Any, batches: Any, stop: Any) -> Any:
        if run.progress.step == number - 1:
            do(run, stop)
        return real(run, batches, stop)

    loop.step = step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """Six steps of one process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(words(run, smoke_data)) == 0
    return run


def second_falls() -> None:
    """The second of two processes is killed in its third step, in its first life."""
    at_step(4, lambda run, _: kill_self() if run.parallel.rank and not life() else None)


def test_a_lost_process_leads_to_a_restart_from_the_newest_checkpoint(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the run of two processes that lost none, to the bit."""
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    more = ["parallel.sharding=fsdp2"]
    for name, before in (("a", None), ("b", second_falls)):
        launcher = Torchrun(
            options, words(tmp_path / name, smoke_data, *more), tmp_path / f"{name}.log", before
        )
        assert launcher.finish() == 0, launcher.log.read_text()
    said = (tmp_path / "b.log").read_text()
    assert f"going on from {tmp_path}/b/checkpoints/step_00000002" in said
    # Rows count from 0; a step of the smoke run reads 16.
    assert "note: the process before ended in step 4 (rows 48-63), or after it" in said
    assert_same_run(tmp_path / "b", tmp_path / "a", 6)


def always_falls() -> None:
    """Killed in the third step of each life, but where a file says that the cause is gone."""

    def fall(run: Any, _: Any) -> None:
        if not (run.directory.path.parent / "repaired").exists():
            kill_self()

    at_step(3, fall)


def test_a_run_that_falls_three_times_in_a_step_stops_and_tells_its_rows(
    tmp_path: Path, smoke_data: Path, whole: Path
) -> None:
    """Oracle: by hand; the user's own start goes on to the run that did not fall."""
    run = tmp_path / "run"
    launcher = Torchrun(ONE, words(run, smoke_data), tmp_path / "log", always_falls)
    assert launcher.finish() == 1
    said = launcher.log.read_text()
    line = (
        f"llmnorm: {run}: not started again, since it ended 3 times in step 3 (rows 32-47) or in "
        "what follows that step; the log above says how; to try again: llmnorm train"
    )
    assert said.count(line) == 3  # in the lives that are left: 5 restarts, 2 after falls
    assert said.count("going on from") == 2 and steps_in(run) == 2
    (tmp_path / "repaired").touch()
    again = Torchrun(ONE, words(run, smoke_data), tmp_path / "again", always_falls)
    assert again.finish() == 0, again.log.read_text()
    assert_same_run(run, whole, 6)


def diverges() -> None:
    """Every step from the third on has a loss that is not a number."""
    real = loop.step

    def step(run: Any, *rest: Any) -> Any:
        outcome = real(run, *rest)
        if run.progress.step < 3:
            return outcome
        run.progress.skipped_in_a_row = run.progress.step - 2
        return outcome._replace(loss=float("nan"))

    loop.step = step


def full_disk() -> None:
    """The checkpoint of step 2 is refused, as by a full disk."""
    real = keeping.save

    def save(run: Any, metrics: Any) -> None:
        from llmnorm.part import InputError

        if run.progress.step == 2:
            raise InputError("checkpoints: no room")
        real(run, metrics)

    loop.save = save


def dropped() -> None:
    """A PREEMPT file is dropped before the third step."""

    def drop(run: Any, stop: Any) -> None:
        run.directory.preempted.touch()
        wait_until(lambda: stop.exit_code, run.directory.metrics)

    at_step(3, drop)


@pytest.mark.parametrize(
    ("before", "code", "why", "sign"),
    [
        (diverges, 3, "it was refused: training: stopped at step 4", "DIVERGED"),
        (full_disk, 2, "it was refused: checkpoints: no room", None),
        (dropped, 75, "it was stopped at step 3 and is saved; go on with", "PREEMPT"),
    ],
    ids=["diverged", "refused", "preempted"],
)
def test_a_restart_in_vain_leaves_at_once_and_says_why(
    tmp_path: Path, smoke_data: Path, before: Any, code: int, why: str, sign: str | None
) -> None:
    """Oracle: each life's exit code in the launcher's log, the metrics, and the sign."""
    run, more = tmp_path / "run", ["training.max_skipped_steps=2"]
    launcher = Torchrun(
        ["--standalone", "--nproc-per-node", "1", "--max-restarts", "2"],
        words(run, smoke_data, *more),
        tmp_path / "log",
        before,
    )
    assert launcher.finish() == 1
    said = launcher.log.read_text()
    assert said.count(f"{run}: not started again, since {why}") == 2, said
    assert said.count(f"failed (exitcode: {code})") == 3, said
    assert "going on from" not in said
    signs = [name for name in ("DONE", "PREEMPT", "DIVERGED") if (run / name).exists()]
    assert signs == ([sign] if sign else [])


def test_what_stopped_under_another_launcher_goes_on(
    tmp_path: Path, smoke_data: Path, whole: Path
) -> None:
    """Oracle: the run that was not stopped; the first life of the second launcher is killed before
    it has looked at anything, so that its second finds what the first launcher's run has left."""
    run = tmp_path / "run"
    first = Torchrun(ONE[:3], words(run, smoke_data), tmp_path / "log", dropped)
    assert first.finish() == 1 and (run / "PREEMPT").read_text() == "3\n"
    second = Torchrun(ONE, words(run, smoke_data), tmp_path / "again", falls_while_it_loads)
    assert second.finish() == 0, second.log.read_text()
    assert_same_run(run, whole, 6)


def falls_while_it_loads() -> None:
    """The first life is killed before it joins the other processes."""
    real = loop.prepare

    def prepare(*arguments: Any, **options: Any) -> Any:
        if not life():
            kill_self()
        return real(*arguments, **options)

    loop.prepare = prepare


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def slow() -> None:
    """Steps of at least a tenth of a second, so that somebody can come in between."""
    real = loop.step

    def step(*arguments: Any) -> Any:
        time.sleep(0.1)
        return real(*arguments)

    loop.step = step


def test_an_elastic_launch_goes_on_with_the_processes_that_are_left(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: one process's run, up to the order of sums; the second launcher is killed, and its
    worker with it."""
    run, one = tmp_path / "run", tmp_path / "one"
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    options += ["--rdzv-id", "elastic", "--local-addr", "localhost"]
    conf = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    more = ["parallel.sharding=ddp", "training.steps=30", "checkpoint.every=4"]
    nodes = []
    for number in range(2):
        host = ["--rdzv-conf", f"{conf},is_host={int(not number)}"]
        log = tmp_path / f"{number}.log"
        nodes.append(Torchrun([*options, *host], words(run, smoke_data, *more), log, slow))
    wait_until(lambda: steps_in(run) >= 6, nodes[0].log)
    workers = children(nodes[1].process.pid)
    os.kill(nodes[1].process.pid, signal.SIGKILL)
    assert nodes[0].finish() == 0, nodes[0].log.read_text()
    wait_until(lambda: not any(map(alive, workers)), nodes[1].log)
    said = nodes[0].log.read_text() + nodes[1].log.read_text()
    assert "2 process(es) on cpu" in said and "1 process(es) on cpu" in said
    assert "processes 2 -> 1" in said
    assert cli.main(words(one, smoke_data, "training.steps=30")) == 0
    for ours, theirs in zip(metrics_of(run), metrics_of(one), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-4)


def first_is_late() -> None:
    """Process 0, which speaks for all, is the last to find out what is wrong."""
    real = cli.main

    def main(given: list[str]) -> int:
        if os.environ["RANK"] == "0":
            time.sleep(0.5)
        return real(given)

    cli.main = main


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_at_once(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: by hand: of 2 and 4, which are as near to 3 and divide 16, the smaller is named; the
    line is there in each life, though the launcher ends all processes when one has failed."""
    options = ["--standalone", "--nproc-per-node", "3", "--max-restarts", "1"]
    given = words(tmp_path / "run", smoke_data)
    launcher = Torchrun(options, given, tmp_path / "log", first_is_late)
    assert launcher.finish() == 1
    line = (
        "llmnorm: error: training.global_batch: 16 rows do not divide over 3 processes; start 2, "
        "the nearest number that they divide over (a new run could have training.global_batch=15)"
    )
    assert launcher.log.read_text().count(line) == 2
    assert not (tmp_path / "run").exists()


def begun(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A real launcher, with one thread a process; what it prints goes to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def test_torchrun_restarts_after_a_kill_and_hands_on_a_schedulers_warning(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the signs and exit codes; the real command and its real processes."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = begun(
        [
            *python("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
            *("-m", "llmnorm", *words(run, smoke_data, "parallel.sharding=ddp", *LONG)),
        ],
        log,
    )
    wait_until(lambda: steps_in(run) >= 25, log)
    first = children(launcher.pid)
    os.kill(max(first), signal.SIGKILL)
    wait_until(lambda: "ended in step" in log.read_text(), log)
    wait_until(lambda: steps_in(run) >= 60, log)
    assert not set(first) & set(children(launcher.pid))
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(PATIENCE) != 0
    said = log.read_text()
    step = int((run / "PREEMPT").read_text())
    assert f"stopped by SIGUSR1 at step {step} of 100000, saved" in said
    assert metrics_of(run)[-1]["step"] == step
    assert (run / "checkpoints" / f"step_{step:08d}").is_dir()


def test_a_killed_launcher_leaves_no_process_behind_and_the_run_saved(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the process table, and the sign of a run that was stopped."""
    run = tmp_path / "run"
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    launcher = Torchrun(options, words(run, smoke_data, *LONG), tmp_path / "log", slow)
    wait_until(lambda: steps_in(run) >= 3, launcher.log)
    workers = children(launcher.process.pid)
    assert len(workers) == 2
    launcher.process.kill()
    wait_until(lambda: not any(map(alive, workers)), launcher.log)
    step = int((run / "PREEMPT").read_text())
    said = launcher.log.read_text()
    assert f"stopped by SIGTERM at step {step} of 100000, saved" in said
    assert "not started again" not in said


def test_accelerate_restarts_after_a_kill_and_stops_at_a_file(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the signs and what is said; the real command and its real processes."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = begun(
        [
            *python("accelerate.commands.launch", "--config_file"),
            *("launch/accelerate/ddp.yaml", "--num_processes", "2"),
            *("--max_restarts", "2", "-m", "llmnorm", *words(run, smoke_data, *LONG)),
        ],
        log,
    )
    wait_until(lambda: steps_in(run) >= 25, log)
    os.kill(max(children(launcher.pid)), signal.SIGKILL)
    wait_until(lambda: "ended in step" in log.read_text(), log)
    wait_until(lambda: steps_in(run) >= 60, log)
    (run / "PREEMPT").touch()
    assert launcher.wait(PATIENCE) == 1
    said = log.read_text()
    assert f"going on from {run}/checkpoints/step_000000" in said
    stopped = int((run / "PREEMPT").read_text())
    assert f"stopped by a PREEMPT file at step {stopped} of 100000, saved" in said
    assert said.count(f"not started again, since it was stopped at step {stopped}") == 1
