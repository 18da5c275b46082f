"""The runs of a comparison: N at a time, each an ordinary `llmnorm train` on a device of its own.

    <directory>/runs.jsonl     a line a finished run (see `Record`), which is never made again
    <runs>/<arm>/<run>/        run directories; <run>.log beside them is what the run has printed

A line is brought to the disk before its run counts as finished, so a kill at any moment loses at
most what a run has trained since its last checkpoint: the next start goes on from there. The lines
are all that tables and pictures are made of; the run directories may be deleted.

What would surprise: the runs stop (and save) when this process dies, however it dies; a run that
another process still holds is waited for. A diverged run is a result; any other failure ends the
comparison, after the other runs have saved.
"""

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Protocol

from llmnorm.analysis.compare.plan import Protocol as Comparison
from llmnorm.analysis.compare.plan import Run
from llmnorm.analysis.runs import progress
from llmnorm.machine.doctor import version
from llmnorm.machine.gpus import FREE_GPU_MIB, visible_gpus
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lock import is_locked
from llmnorm.runs.record import read_metrics
from llmnorm.training.signals import StopRequest

POLL_SECONDS = 0.2
SAY_SECONDS = 60.0  # between two lines of progress where nothing is finished
STOP_SECONDS = 600.0  # a run may take to save after SIGTERM


@dataclass(frozen=True)
class Record:
    """A finished run, as a line of runs.jsonl.

    Attributes:
        run: its key.
        steps, tokens: what it trained.
        loss: on the validation text at the end, nats a token; None where it diverged.
        bits_per_byte: the same text.
        curve: (tokens, training loss) of each logged step.
        tokens_per_second: median of the logged rates, evaluation and saving left out.
        place: device, threads and runs at a time: rates of unequal places are not comparable.
        version: of the code.
    """

    run: str
    steps: int
    tokens: int
    loss: float | None
    bits_per_byte: float | None
    curve: list[list[float]]
    tokens_per_second: float | None
    place: str
    version: str

    @property
    def final(self) -> float:
        """The loss, infinite where the run diverged."""
        return math.inf if self.loss is None else self.loss


class Ledger:
    """runs.jsonl: the finished runs by key."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill has torn is cut off at the next `add`.

        Raises:
            InputError: a line is none of ours.
        """
        self._path = path
        self.records: dict[str, Record] = {}
        self._whole = 0  # bytes
        raw = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(raw.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError):
                raise InputError(f"{path}, line {number}: not a line of runs.jsonl") from None
            self.records[record.run] = record
            self._whole += len(line)

    @property
    def losses(self) -> dict[str, float]:
        """Final losses, infinite where a run diverged."""
        return {key: record.final for key, record in self.records.items()}

    def add(self, record: Record) -> None:
        """Append a line and bring it to the disk.

        Raises:
            InputError: it cannot be written.
        """
        line = (json.dumps(asdict(record), allow_nan=False) + "\n").encode()
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written: {error.strerror}") from None
        self.records[record.run] = record
        self._whole += len(line)


class Process(Protocol):
    """What is asked of a started run (subprocess.Popen has it)."""

    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and stop."""


Launch = Callable[[Sequence[str], IO[bytes], Mapping[str, str]], Process]


def launch(words: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> Process:
    """Start `llmnorm train WORDS` of this very package, its output in `log`."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    # A session of its own: Ctrl-C reaches this process alone, which asks the runs to stop.
    return subprocess.Popen(
        [sys.executable, "-m", "llmnorm", "train", *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONPATH": paths},
        start_new_session=True,
        preexec_fn=stop_with_parent,
    )


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, where it can (Linux)."""
    if _prctl is not None:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_prctl = getattr(ctypes.CDLL(None), "prctl", None)


@dataclass(frozen=True)
class Slots:
    """Where runs go.

    Attributes:
        gpus: the GPU of each slot; empty: runs are on the CPU.
        threads: CPU threads of a run.
        count: runs at a time.
        per_gpu: runs that share a GPU.
    """

    gpus: tuple[int, ...]
    threads: int
    count: int
    per_gpu: int = 1

    def environment(self, slot: int) -> dict[str, str]:
        """What a run's process is told; nothing of a launcher that this process may have had."""
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        kept = {key: value for key, value in os.environ.items() if key not in launcher}
        kept |= {"OMP_NUM_THREADS": str(self.threads)}
        return kept | ({"CUDA_VISIBLE_DEVICES": str(self.gpus[slot])} if self.gpus else {})

    def describe(self) -> str:
        """As `Record.place`."""
        where = "GPU" if self.gpus else f"CPU, {self.threads} thread{'s' * (self.threads > 1)}"
        shared = f", {self.per_gpu} on each" if self.per_gpu > 1 else ""
        return f"{where}, {self.count} at a time{shared}"


def slots(parallel: int, device: str, per_gpu: int = 1) -> Slots:
    """The places for `parallel` runs at a time on `training.device`, `per_gpu` on each GPU.

    Raises:
        InputError: there are not that many devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // parallel))
    gpus = visible_gpus() if device != "cpu" else []
    free = [gpu.index for gpu in gpus if gpu.used_mib <= FREE_GPU_MIB]
    if gpus and parallel > len(free) * per_gpu:
        raise InputError(
            f"--parallel {parallel}: {len(free)} of {len(gpus)} GPUs are free; a run has one to "
            "itself; runs too small to fill one can share it: --runs-per-gpu"
        )
    if not gpus and per_gpu > 1:
        raise InputError(f"--runs-per-gpu {per_gpu}: there is no GPU; leave it out")
    if not gpus and parallel > cores:
        raise InputError(f"--parallel {parallel}: there are {cores} cores; a run has one to itself")
    places = [gpu for _ in range(per_gpu) for gpu in free]
    return Slots(tuple(places[:parallel]) if gpus else (), threads, parallel, per_gpu)


@dataclass
class _Job:
    run: Run
    slot: int
    process: Process


def execute(
    protocol: Comparison,
    ledger: Ledger,
    runs: Path,
    places: Slots,
    seconds_left: Callable[[Iterable[tuple[Run, float]]], float],
    *,
    keep_checkpoints: bool = False,
    start: Launch = launch,
) -> int:
    """Make every run that the protocol needs and the ledger lacks.

    Args:
        runs: where run directories are made.
        seconds_left: what the given parts of runs will take, one after the other.
        keep_checkpoints: keep those of finished runs.
        start: how a run is started.

    Returns:
        0, or 143 / 130 after SIGTERM / SIGINT (the runs have saved).

    Raises:
        InputError: a run failed; one line that names it and its log.
    """
    jobs: list[_Job] = []
    said = 0.0
    with StopRequest() as stop:
        try:
            while not stop.exit_code:
                ended = [job for job in jobs if job.process.poll() is not None]
                jobs = [job for job in jobs if job not in ended]  # not polled again: it may end now
                for job in ended:
                    directory = runs / job.run.key
                    record = _record(job, RunDirectory(directory), protocol, places)
                    ledger.add(record)
                    if not keep_checkpoints:
                        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
                    _say(
                        f"{_state(protocol, ledger, runs, places, seconds_left)}; {_shown(record)}"
                    )
                    said = time.monotonic()
                todo = [r for r in protocol.needed(ledger.losses) if r.key not in ledger.records]
                if not todo:
                    return 0
                running = {job.run.key for job in jobs}
                for run in todo:
                    if len(jobs) >= places.count:
                        break
                    # One that an earlier comparison left behind is waited for.
                    if run.key not in running and not is_locked(runs / run.key):
                        jobs.append(_begin(run, protocol, runs, places, jobs, start))
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    state = _state(protocol, ledger, runs, places, seconds_left)
                    _say("; ".join([state, *_running(jobs, runs, protocol)]))
                time.sleep(POLL_SECONDS)
            _say(f"stopping: {len(jobs)} runs save what they have; the same command goes on")
            return stop.exit_code
        finally:
            _stop(jobs)


def _begin(
    run: Run,
    protocol: Comparison,
    runs: Path,
    places: Slots,
    jobs: Sequence[_Job],
    start: Launch,
) -> _Job:
    slot = min(set(range(places.count)) - {job.slot for job in jobs})
    directory = runs / run.key
    directory.parent.mkdir(parents=True, exist_ok=True)
    RunDirectory(directory).diverged.unlink(missing_ok=True)  # of a start that was killed
    with _log(directory).open("ab") as log:
        words = protocol.words(run, directory)
        return _Job(run, slot, start(words, log, places.environment(slot)))


def _stop(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while any(job.process.poll() is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _log(directory: Path) -> Path:
    """Beside the run directory, which a refused run must not find."""
    return directory.with_name(f"{directory.name}.log")


def _record(job: _Job, run: RunDirectory, protocol: Comparison, places: Slots) -> Record:
    code = job.process.poll()
    diverged = run.diverged.is_file()
    if not diverged and not (code == 0 and run.done.is_file()):
        log = _log(run.path)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("llmnorm: error: ") if lines else "it said nothing"
        raise InputError(f"run {job.run.key} failed (exit code {code}): {last}; its log: {log}")
    loss, bits, curve, rates = None, None, [], []
    step, tokens = protocol.steps_of(job.run), protocol.tokens_of(job.run)
    if diverged:
        step = int(run.diverged.read_text())
    else:
        metrics = read_metrics(run.metrics)
        training = metrics.training
        curve = [
            [int(t), round(x, 4)] for t, x in zip(training["tokens"], training["loss"], strict=True)
        ]
        rates, tokens = training["tokens_per_second"], int(training["tokens"][-1])
        # A loss that is not finite is left out of the record, and the last one must be the end's.
        if metrics.validation["step"] and metrics.validation["step"][-1] == step:
            loss, bits = metrics.validation["loss"][-1], metrics.bits_per_byte.get("all")
    return Record(
        run=job.run.key,
        steps=step,
        tokens=tokens,
        loss=loss,
        bits_per_byte=bits,
        curve=curve,
        tokens_per_second=float(f"{median(rates):.6g}") if rates else None,
        place=places.describe(),
        version=version(),
    )


def _shown(record: Record) -> str:
    result = "diverged" if record.loss is None else f"has loss {record.loss:.4f}"
    return f"{record.run} {result}"


def _state(
    protocol: Comparison,
    ledger: Ledger,
    runs: Path,
    places: Slots,
    seconds_left: Callable[[Iterable[tuple[Run, float]]], float],
) -> str:
    """Runs that are done, and the time that the others will take."""
    expected = protocol.needed(ledger.losses, expected=True)
    left = [
        (run, 1 - progress(RunDirectory(runs / run.key))[0] / protocol.steps_of(run))
        for run in expected
        if run.key not in ledger.records
    ]
    time_left = f" about {duration(seconds_left(left) / places.count)} left" if left else ""
    return f"[{len(expected) - len(left)}/{len(expected)}]{time_left}"


def _running(jobs: Sequence[_Job], runs: Path, protocol: Comparison) -> list[str]:
    return [
        f"{job.run.key} at step {progress(RunDirectory(runs / job.run.key))[0]}"
        f"/{protocol.steps_of(job.run)}"
        for job in jobs
    ]


def duration(seconds: float) -> str:
    """A time for a person: `2 h 05 min`, `7 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)
