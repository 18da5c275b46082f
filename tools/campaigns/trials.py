"""Many small attempts to break a command (or a script of ours), and the judgement of each.

    python tools/campaigns/settings.py --trials 300 --seed 7 [--out FILE]

A campaign makes trial number n from (seed, n) alone, so that any trial can be run again:
`--only N` does, and prints all of it. Each trial is a fork of this process, which has torch
imported, with one thread; every tenth is a real command instead. Finished trials stand in `--out`,
a line each, and are not run again by the same call: so a campaign that was killed goes on.

A trial passes if the command ended with exit code 0 or 2 (or what the campaign allows), without a
traceback, and did not hang: it took less than 20 s of processor time, and never waited for 20 s
without using any (so a busy machine changes no verdict); if a refusal is at most 21 lines which all
name the file or key, and took less than 1 GB; and if the campaign's own check finds nothing lost.
"""

import argparse
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

SECONDS = 20.0
MEMORY = 1_000_000_000  # bytes that a refusal may need beyond what this process has at the fork
REAL = 10  # one trial in so many is a real command


class Result(NamedTuple):
    """How a command ended.

    Attributes:
        code: exit code; minus the signal's number where a signal has killed it.
        out, err: what it printed.
        seconds: of processor time.
        memory: peak bytes, without those that this process had at the fork.
        hung: it was killed because it hung.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    hung: bool


@dataclass
class Trial:
    """One attempt.

    Attributes:
        what: the mutation, for people.
        words: after `llmnorm`, or after the script.
        folder: where the command runs; removed after the trial.
        names: texts of which every line of a refusal holds one: files, keys, option names.
        codes: allowed exit codes.
        check: what was lost or is wrong, given the result; empty for nothing.
        environment: variables beside those of this process.
        times: how many times the usual limit it may take.
        script: a module with a `main(words)` that returns the exit code, run in place of `llmnorm`.
        figures: what was measured, as JSON values; `check` may add to it.
    """

    what: str
    words: list[str]
    folder: Path
    names: list[str]
    codes: tuple[int, ...] = (0, 2)
    check: Callable[[Result], list[str]] = lambda _: []
    environment: dict[str, str] = field(default_factory=dict)
    times: float = 1.0
    script: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def command(
    words: list[str],
    folder: Path,
    *,
    real: bool = False,
    environment: dict[str, str] | None = None,
    seconds: float = SECONDS,
    script: str | None = None,
) -> Result:
    """Run `llmnorm WORDS` in `folder`, as a fork of this process or as a real command.

    With a `script`, that is run instead (Trial).
    """
    log = Path(tempfile.mkdtemp(prefix="trial-"))
    baseline = 0 if real else _resident()
    with (log / "out").open("wb") as out, (log / "err").open("wb") as err:
        child = start(words, folder, out, err, real=real, environment=environment, script=script)
    status, usage, hung = _wait(child, seconds)
    taken = usage.ru_utime + usage.ru_stime
    printed, errors = (
        (log / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")
    )
    shutil.rmtree(log)
    peak = max(0, usage.ru_maxrss * 1024 - baseline)
    return Result(os.waitstatus_to_exitcode(status), printed, errors, taken, peak, hung)


def start(
    words: list[str],
    folder: Path,
    out: IO[bytes],
    err: IO[bytes],
    *,
    real: bool,
    environment: dict[str, str] | None = None,
    script: str | None = None,
) -> int:
    """Begin `llmnorm WORDS` in `folder`, in a session of its own; the process' number."""
    if real:
        return subprocess.Popen(
            [sys.executable, "-m", script or "llmnorm", *words],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=_hear_hangups,
        ).pid
    child = os.fork()
    if child == 0:
        module = script or "llmnorm.cli"
        _run_and_exit(module, words, folder, environment or {}, out.fileno(), err.fileno())
    return child


def _hear_hangups() -> None:
    """A campaign under nohup would hand on that SIGHUP is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _run_and_exit(
    module: str, words: list[str], folder: Path, environment: dict[str, str], out: int, err: int
) -> None:
    code = 1
    try:
        os.setsid()
        _hear_hangups()
        os.chdir(folder)
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        sys.path[:] = ["", *sys.path]
        code = importlib.import_module(module).main(words)
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage, bool]:
    """Wait for a process, and kill its session if it hangs: see the top of the file."""
    used, last, hung = 0.0, time.monotonic(), False
    while True:
        found, status, usage = os.wait4(child, 0 if hung else os.WNOHANG)
        if found:
            return status, usage, hung
        now = _processor_time(child)
        if now > used:
            used, last = now, time.monotonic()
        if used > seconds or time.monotonic() - last > seconds:
            hung = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)


def _processor_time(child: int) -> float:
    """Seconds of a process and of its children that have ended."""
    with open(f"/proc/{child}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def judge(trial: Trial, result: Result) -> list[str]:
    """What is wrong with a trial's result; empty if it passes."""
    wrong = []
    errors = [line for line in result.err.splitlines() if line.startswith("llmnorm: error: ")]
    if result.hung:
        wrong.append(f"hung, after {result.seconds:.1f} s of processor time")
    elif result.code not in trial.codes:
        wrong.append(f"exit code {result.code}")
    if "Traceback (most recent call last)" in result.err + result.out:
        wrong.append("a traceback")
    if result.code == 2:
        if not 1 <= len(errors) <= 21:
            wrong.append(f"{len(errors)} lines of errors")
        wrong += [
            f"names no file or key: {line[:200]}"
            for line in errors
            if not any(name in line for name in trial.names)
        ]
        if result.memory > MEMORY:
            wrong.append(f"{result.memory / 1e9:.1f} GB for a refusal")
    return wrong + ([] if result.hung else trial.check(result))


def campaign(
    name: str,
    make: Callable[[int, random.Random, Path], Trial],
    *,
    default: int,
    about: str,
    report: Callable[[list[dict[str, Any]]], str] | None = None,
) -> int:
    """The command line of a campaign: run its trials, print what failed and a last line.

    Args:
        name: of the campaign; with the seed and the trial's number it seeds the trial's generator.
        make: the trial of a number, given its generator and an empty folder.
        default: trials without `--trials`.
        about: what `--help` says.
        report: what is printed of all finished trials' records, before the last line.

    Returns:
        The exit code: 1 if a trial failed.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--trials", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="finished trials, a JSON line each")
    parser.add_argument("--only", type=int, metavar="N", help="run this trial and print it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of a trial")
    given = parser.parse_args()
    done = _finished(given.out, given.seed)
    numbers = [given.only] if given.only is not None else range(given.trials)
    print(f"{name}: seed {given.seed}, {len(numbers)} trials, {len(done)} of them done before")
    left = [number for number in numbers if number not in done or given.only is not None]
    if left:
        _settle()
    for number in tqdm(left, desc=name, unit="trial", disable=None):
        record = _one(name, make, given.seed, number, given.seconds, show=given.only is not None)
        done[number] = record
        if record["wrong"]:
            tqdm.write(f"{name} {number}: {record['what']}: {'; '.join(record['wrong'])}")
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    records = [done[number] for number in numbers]
    if report is not None:
        print(report(records))
    return _summary(name, given.seed, records)


def _one(
    name: str,
    make: Callable[[int, random.Random, Path], Trial],
    seed: int,
    number: int,
    seconds: float,
    *,
    show: bool,
) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix=f"campaign-{name}-"))
    try:
        trial = make(number, random.Random(f"{name} {seed} {number}"), folder)
        real = number % REAL == 0
        result = command(
            trial.words,
            trial.folder,
            real=real,
            environment=trial.environment,
            seconds=seconds * trial.times,
            script=trial.script,
        )
        if show:
            name = f"python -m {trial.script}" if trial.script else "llmnorm"
            print(f"{trial.what}\n$ {name} {' '.join(trial.words)}\n{result.out}{result.err}")
        wrong = judge(trial, result)
        return {
            "seed": seed,
            "number": number,
            "what": trial.what,
            "real": real,
            "code": result.code,
            "seconds": round(result.seconds, 2),
            "memory": result.memory,
            "error": re.sub(r"\s+", " ", result.err)[-300:] if result.code else "",
            "wrong": wrong,
            "figures": trial.figures,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle() -> None:
    """Import what every trial needs, once, with one thread, so that a fork of it is sound."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[1:2]]),
    )
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch

    torch.set_num_threads(1)
    importlib.import_module("llmnorm.training.loop")


def _finished(file: Path | None, seed: int) -> dict[int, dict[str, Any]]:
    if file is None or not file.is_file():
        return {}
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return {record["number"]: record for record in records if record["seed"] == seed}


def _summary(name: str, seed: int, records: list[dict]) -> int:
    codes = Counter(record["code"] for record in records)
    failed = [record for record in records if record["wrong"]]
    listed = ", ".join(f"{count} ended with {code}" for code, count in sorted(codes.items()))
    print(
        f"{name}: seed {seed}: {len(records)} trials "
        f"({sum(record['real'] for record in records)} real commands): {listed}; "
        f"slowest {max(r['seconds'] for r in records):.1f} s of processor time, "
        f"most memory {max(r['memory'] for r in records) / 1e6:.0f} MB; {len(failed)} failed"
    )
    return 1 if failed else 0
