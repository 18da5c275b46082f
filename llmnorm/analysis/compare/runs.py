"""The runs of a comparison: N at a time, each an ordinary `llmnorm train` on a device of its own.

    <directory>/runs.jsonl     a line a finished run (`ledger.Record`), which is not made again
    <runs>/<arm>/<run>/        run directories; <run>.log beside them is what the run has printed

A line is on the disk before its run counts as finished. A kill at any moment therefore loses at
most what a run has trained since its last checkpoint, from which the next start continues. Tables
and pictures are made of the lines alone; the run directories may be deleted.

What would surprise:
- The runs save and stop when this process is asked to stop; on Linux also when it is killed.
- A run whose directory another process still trains in is waited for.
- A diverged run is a result. Any other failure ends the comparison, once the other runs have saved.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llmnorm.analysis.compare.estimate import duration
from llmnorm.analysis.compare.launch import Launch, Process, Slots, launch
from llmnorm.analysis.compare.ledger import Ledger, Record
from llmnorm.analysis.compare.plan import Protocol, Run
from llmnorm.analysis.runs import progress
from llmnorm.machine.doctor import version
from llmnorm.machine.failures import DIVERGED
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import read_lines
from llmnorm.runs.lock import is_locked
from llmnorm.runs.record import read_metrics
from llmnorm.runs.signs import step_in
from llmnorm.training.signals import EXIT_CODES, StopRequest

POLL_SECONDS = 0.2
PROGRESS_SECONDS = 60.0  # between two lines of progress while no run finishes
STOP_SECONDS = 600.0  # for the runs to save after SIGTERM


@dataclass
class _Job:
    run: Run
    slot: int
    process: Process


def execute(
    protocol: Protocol,
    ledger: Ledger,
    runs: Path,
    slots: Slots,
    seconds_of: Callable[[Iterable[tuple[Run, float]]], float],
    *,
    keep_checkpoints: bool = False,
    start: Launch = launch,
) -> int:
    """Make every run that the protocol needs and the ledger lacks.

    Args:
        runs: directory in which the run directories are made.
        slots: the places for runs.
        seconds_of: seconds that (run, share of it) pairs take one after the other.
        keep_checkpoints: keep the checkpoints of finished runs.
        start: how a run is started.

    Returns:
        0, or the exit code of a signal (`signals.EXIT_CODES`), when the runs have saved.

    Raises:
        InputError: a run failed; one line that names it and its log.
    """
    jobs: list[_Job] = []
    last_line = 0.0  # when progress was last printed
    with StopRequest() as stop:
        try:
            while not stop.exit_code:
                ended = [job for job in jobs if job.process.poll() is not None]
                jobs = [job for job in jobs if job not in ended]  # not polled again: it may end now
                for job in ended:
                    directory = runs / job.run.key
                    record = _record(job, RunDirectory(directory), protocol, slots)
                    ledger.add(record)
                    if not keep_checkpoints:
                        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
                    state = _state(protocol, ledger, runs, slots, seconds_of)
                    _print(f"{state}; {_result(record)}")
                    last_line = time.monotonic()
                todo = [r for r in protocol.needed(ledger.losses) if r.key not in ledger.records]
                if not todo:
                    return 0
                running = {job.run.key for job in jobs}
                for run in todo:
                    if len(jobs) >= slots.count:
                        break
                    # A process that an earlier comparison left behind may still train in it.
                    if run.key not in running and not is_locked(runs / run.key):
                        jobs.append(_begin(run, protocol, runs, slots, jobs, start))
                if time.monotonic() - last_line > PROGRESS_SECONDS:
                    last_line = time.monotonic()
                    state = _state(protocol, ledger, runs, slots, seconds_of)
                    _print("; ".join([state, *_running(jobs, runs, protocol)]))
                time.sleep(POLL_SECONDS)
            _print(
                f"stopping: {len(jobs)} unfinished runs save a checkpoint, finished ones are kept; "
                "the same command continues"
            )
            return stop.exit_code
        finally:
            _stop(jobs)


def _begin(
    run: Run,
    protocol: Protocol,
    runs: Path,
    slots: Slots,
    jobs: Sequence[_Job],
    start: Launch,
) -> _Job:
    """Start a run in the first free slot, or continue it from its last checkpoint."""
    slot = min(set(range(slots.count)) - {job.slot for job in jobs})
    directory = runs / run.key
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A run that diverged without a line in the ledger (a kill came between) is made again.
    RunDirectory(directory).diverged.unlink(missing_ok=True)
    with _log(directory).open("ab") as log:
        arguments = protocol.train_arguments(run, directory)
        return _Job(run, slot, start(arguments, log, slots.environment(slot)))


def _stop(jobs: Sequence[_Job]) -> None:
    """Ask the runs to save and stop, and wait for them."""
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while any(job.process.poll() is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _log(directory: Path) -> Path:
    """A run's log, beside its directory: inside, `train` would refuse the directory as not free."""
    return directory.with_name(f"{directory.name}.log")


def _record(job: _Job, run: RunDirectory, protocol: Protocol, slots: Slots) -> Record:
    """What an ended run has reached; an InputError if it neither finished nor diverged."""
    code = job.process.poll()
    diverged = code == DIVERGED
    if not diverged and not (code == 0 and run.done.is_file()):
        log = _log(run.path)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        last = lines[-1].removeprefix("llmnorm: error: ") or "it printed nothing"
        raise InputError(
            f"run {job.run.key} {_ended(code)}: {last}; its log is {log}; finished runs "
            "are kept, and the same command continues"
        )
    loss, bits, curve, rates = None, None, [], []
    figures: dict[str, Any] = {}
    seconds: float | None = None
    memory: int | None = None
    step, tokens = protocol.steps_of(job.run), protocol.tokens_of(job.run)
    if diverged:
        step = step_in(run.diverged) or step
    else:
        metrics = read_metrics(run.metrics)
        training = metrics.training
        curve = [
            [int(t), round(x, 4)] for t, x in zip(training["tokens"], training["loss"], strict=True)
        ]
        rates, tokens = training["tokens_per_second"], int(training["tokens"][-1])
        # metrics.jsonl leaves out losses that are not finite, so the last one may be of an earlier
        # step; then the run counts as diverged.
        if metrics.validation["step"] and metrics.validation["step"][-1] == step:
            loss, bits = metrics.validation["loss"][-1], metrics.bits_per_byte.get("all")
        entries = [entry.value for entry in read_lines(run.metrics).entries]
        if loss is not None:
            figures = next(e["validation"] for e in reversed(entries) if "validation" in e)
        memory = next((e["memory_bytes"] for e in reversed(entries) if "memory_bytes" in e), None)
        seconds = max(entry["seconds"] for entry in entries)
    return Record(
        run=job.run.key,
        steps=step,
        tokens=tokens,
        loss=loss,
        bits_per_byte=bits,
        curve=curve,
        tokens_per_second=float(f"{median(rates):.6g}") if rates else None,
        place=slots.describe(),
        version=version(),
        figures=figures,
        seconds=seconds,
        memory_bytes=memory,
    )


def _ended(code: int | None) -> str:
    """How a run that gave no result ended."""
    if code is not None and code < 0:
        return f"was killed by signal {-code}"
    if code in EXIT_CODES.values():
        return f"was stopped by a signal of its own (exit code {code}), and has saved"
    return f"failed (exit code {code})"


def _result(record: Record) -> str:
    result = "diverged" if record.loss is None else f"has loss {record.loss:.4f}"
    return f"{record.run} {result}"


def _state(
    protocol: Protocol,
    ledger: Ledger,
    runs: Path,
    slots: Slots,
    seconds_of: Callable[[Iterable[tuple[Run, float]]], float],
) -> str:
    """`[3/14] about 7 min left`: finished runs of all, and the time for the others."""
    expected = protocol.needed(ledger.losses, expected=True)
    left = [
        (run, 1 - progress(RunDirectory(runs / run.key))[0] / protocol.steps_of(run))
        for run in expected
        if run.key not in ledger.records
    ]
    time_left = f" about {duration(seconds_of(left) / slots.count)} left" if left else ""
    return f"[{len(expected) - len(left)}/{len(expected)}]{time_left}"


def _running(jobs: Sequence[_Job], runs: Path, protocol: Protocol) -> list[str]:
    """Each running run and its last logged step."""
    return [
        f"{job.run.key} at step {progress(RunDirectory(runs / job.run.key))[0]}"
        f"/{protocol.steps_of(job.run)}"
        for job in jobs
    ]


def _print(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)
