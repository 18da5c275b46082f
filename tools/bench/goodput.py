"""What a kill costs a run, and its goodput: the share of its time in steps that counted.

usage: python tools/bench/goodput.py [--kills 20] [--minutes 20] [--work DIR] [--out FILE]

Real commands are killed with SIGKILL and started again at once: a small run of one process, one of
two under FSDP2 (torchrun starts it again by itself, one of its two processes is killed), and one of
one process whose checkpoint is 1 GB. Each is killed at a random moment between two checkpoints,
which are written in the background.

From the costs of the 1 GB run follows the goodput at one kill an hour:

    lost = half an interval + the writing of a checkpoint + the restart + what finds the kill
           + (checkpoints an hour) x (how long one holds the loop up)
    goodput = 1 - lost / one hour

The steps of half an interval are done twice on average, and so are those that were trained while
the newest checkpoint was still being written. A killed process is noticed at once; one that hangs,
after `parallel.timeout` and 5 s. At last a small run is killed once a minute, and its metrics tell
what goodput it had; the same sum says what it should have.

Finished measurements stand in DIR (default: build/goodput) and are not made again by the same call.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from report import RESULTS, ROOT, Table, publish

sys.path.insert(0, str(ROOT))

from llmnorm.config.tree import ParallelSettings
from llmnorm.runs.account import read_account
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import read_lines

HOUR, MINUTE = 3600.0, 60.0
INTERVALS = (120.0, 300.0)  # seconds between two checkpoints
LIMITS = {120.0: 0.97, 300.0: 0.945}
# Seconds until the others have ended: of a process that hangs, `parallel.timeout` and 5.
NOTICED = {"killed": 0.0, "hung": ParallelSettings().timeout + 5.0}
PATIENCE = 1200.0  # seconds for a line that must come
SMALL = ["training.global_batch=16"]
# 85 M weights and two moments of each in float32: 1.02 GB.
LARGE = [
    *("model.hidden_size=768", "model.num_hidden_layers=12", "model.intermediate_size=2048"),
    *("model.num_attention_heads=12", "model.num_key_value_heads=12"),
    *("data.context_length=32", "training.global_batch=1"),
]
COMMON = ["training.steps=1000000", "evaluation.every=null", "checkpoint.asynchronous=true"]
COMMON += ["schedule=constant", "training.device=cpu"]


class Kind(NamedTuple):
    """A run that is killed.

    Attributes:
        name: for the table.
        settings: its own.
        every: steps between two checkpoints.
        processes: how many it has; several are launched by torchrun.
        kills: how many of `--kills`, as a share.
    """

    name: str
    settings: list[str]
    every: int
    processes: int = 1
    kills: float = 1.0


KINDS = {
    "small": Kind("0.1 M weights, one process", SMALL, 200),
    "two": Kind("0.1 M weights, two under FSDP2", [*SMALL, "parallel.sharding=fsdp2"], 200, 2),
    "large": Kind("85 M weights (1 GB to save), one process", LARGE, 20, 1, 0.25),
}


class Live:
    """A run that trains in `work/name`, and is started again when it has ended."""

    def __init__(self, work: Path, name: str, kind: Kind) -> None:
        self.run, self.kind = RunDirectory(work / name), kind
        places = [f"run_dir={self.run.path}", f"data.dir={work / 'data'}"]
        settings = [*kind.settings, *COMMON, f"checkpoint.every={kind.every}"]
        self._words = ["configs/smoke.yaml", *settings, *places]
        self._log = work / f"{name}.log"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._call([sys.executable, "-m", "llmnorm", "data", *self._words]).wait()
        self.process = self._begin()

    def _call(self, command: list[str]) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    def _begin(self) -> "subprocess.Popen[bytes]":
        module = ["-m", "llmnorm"]
        if self.kind.processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--max-restarts", "1000"]
            module = ["-m", *torchrun, "--nproc-per-node", str(self.kind.processes), *module]
        return self._call([sys.executable, *module, "train", *self._words])

    def lines(self, *, taken_back: bool = False) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far, and those that were taken back."""
        files = [self.run.repeated, self.run.metrics] if taken_back else [self.run.metrics]
        return [entry.value for file in files for entry in read_lines(file).entries]

    def wait_for(self, found: Callable[[list[dict[str, Any]]], Any]) -> Any:
        """What `found` gives for the lines, once it gives something."""
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            if result := found(self.lines()):
                return result
            if self.process.poll() is not None:
                raise RuntimeError(f"it has ended with {self.process.returncode}: {self._log}")
            time.sleep(0.02)
        raise RuntimeError(f"nothing came for {PATIENCE:.0f} s: {self._log}")

    def kill(self, rank: int) -> float:
        """Kill the process of a rank; where no launcher does it, start the run again."""
        number = self.process.pid if self.kind.processes == 1 else self._worker(rank)
        os.kill(number, signal.SIGKILL)
        moment = time.monotonic()
        if self.kind.processes == 1:
            self.process.wait()
            self.process = self._begin()
        return moment

    def _worker(self, rank: int) -> int:
        """The number of the launcher's process of this rank."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (path / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if parent == self.process.pid and f"RANK={rank}".encode() in variables:
                return int(path.name)
        raise RuntimeError(f"the launcher has no process of rank {rank}: {self._log}")

    def stop(self) -> None:
        """End it as a scheduler does."""
        self.process.terminate()
        self.process.wait()


def kill_once(live: Live, chance: random.Random) -> dict[str, float]:
    """Seconds from a kill to the first step and to the first new one; what was done twice."""
    live.wait_for(lambda lines: lines and any(live.run.checkpoints.glob("step_*")))
    wanted = live.lines()[-1]["step"] + chance.randrange(live.kind.every)
    live.wait_for(lambda lines: lines[-1]["step"] >= wanted)
    moment = live.kill(chance.randrange(live.kind.processes))
    first = live.wait_for(lambda lines: _first_of_a_life(lines, moment))
    # Where another process was killed, the main one may still have finished the step under way.
    before = [e for e in live.lines(taken_back=True) if e["wall"] < first["wall"]]
    last = max(before, key=lambda line: line["step"])
    new = live.wait_for(lambda lines: next((e for e in lines if _is_new(e, first, last)), None))
    again = last["step"] - first["step"] + 1
    return {
        "to_first_step": first["clock"]["monotonic"] - moment,
        "to_new_step": new["clock"]["monotonic"] - moment,
        "steps": again,
        "tokens": again * (last["tokens"] / last["step"]),
    }


def _newest(live: Live) -> Path:
    return max(live.run.checkpoints.glob("step_*"))


def _first_of_a_life(lines: list[dict[str, Any]], moment: float) -> dict[str, Any] | None:
    """The first line of the life that has begun after a moment."""
    later = (line for line in lines if line["clock"]["monotonic"] > moment)
    return next((line for line in later if "restarting" in line["spent"]), None)


def _is_new(line: dict[str, Any], first: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether a line is of the life of `first`, and its step past that of `last`."""
    return line["wall"] >= first["wall"] and line["step"] > last["step"]


def saving(live: Live) -> dict[str, float]:
    """How long a checkpoint in the background holds the loop up, and until it is whole, seconds."""
    holds, whole = [], []
    for _ in range(5):
        newest = _newest(live).name
        live.wait_for(lambda lines: _newest(live).name > newest)  # noqa: B023
        named, step = time.monotonic(), int(_newest(live).name[5:])
        found = live.wait_for(lambda lines: lines if lines[-1]["step"] > step else None)  # noqa: B023
        lines = {line["step"]: line for line in found}
        # The line of a step is written before its save, that of the next step holds its time.
        holds.append(lines[step + 1]["spent"].get("saving", 0.0))
        whole.append(max(0.0, named - lines[step]["clock"]["monotonic"]))
    return {"hold": statistics.median(holds), "whole": statistics.median(whole)}


def goodput(interval: float, costs: dict[str, float], *, found: float, every: float) -> float:
    """The share of time in steps that count, at one kill in `every` seconds.

    Args:
        interval: seconds between two checkpoints.
        costs: `hold` and `whole` of a checkpoint, `restart`, in seconds.
        found: seconds until the kill is noticed.
        every: seconds from one kill to the next.
    """
    lost = interval / 2 + costs["whole"] + costs["restart"] + found
    return 1 - (lost + every / interval * costs["hold"]) / every


def killed_every_minute(work: Path, minutes: float) -> dict[str, float]:
    """A run that is killed once a minute, after a first minute: its goodput by three accounts.

    By its own metrics; by its steps, against those that it would have done at the pace of the first
    minute; and by the sum above.
    """
    trial = Live(work, "pace", Kind("a small run", SMALL, 10**6))
    try:
        trial.wait_for(lambda lines: len(lines) > 10)
        time.sleep(10.0)
        lines = trial.lines()
        pace = _pace(lines[10], lines[-1])
    finally:
        trial.stop()
    kind = Kind("a small run", SMALL, max(1, round(2 * pace)))  # 2 s are to 1 min as 2 min to 1 h
    live = Live(work, "minutely", kind)
    restarts = []
    try:
        live.wait_for(lambda lines: len(lines) > 10)
        start, due = live.lines()[-1], time.monotonic() + MINUTE
        time.sleep(MINUTE)
        pace = _pace(start, before := live.lines()[-1])
        deadline = time.monotonic() + minutes * MINUTE
        while due < deadline:
            time.sleep(max(0.0, due - time.monotonic()))
            moment = live.kill(0)
            first = live.wait_for(lambda lines: _first_of_a_life(lines, moment))  # noqa: B023
            restarts.append(first["clock"]["monotonic"] - moment)
            due += MINUTE
        time.sleep(max(0.0, deadline - time.monotonic()))
    finally:
        live.stop()
    account, lines = read_account(live.run), live.lines()
    wall = account.wall - before["wall"]
    counted = account.goodput * account.wall - before["goodput"] * before["wall"]
    step = 1 / pace
    saves = [line["spent"]["saving"] for line in lines if "saving" in line["spent"]]
    costs = {
        "hold": statistics.median(saves),
        "whole": 0.0,  # its checkpoint of 1 MB
        "restart": statistics.median(restarts),
    }
    return {
        "kills": len(restarts),
        "wall": wall,
        "goodput": counted / wall,
        "by_steps": _pace(before, lines[-1]) / pace,
        "expected": goodput(kind.every * step, costs, found=0.0, every=MINUTE),
        "twice": account.twice,
        "restarting": account.seconds["restarting"],
        "restart": costs["restart"],
        "pace": pace,
        "interval": kind.every * step,
    }


def _pace(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Steps a second between two lines."""
    seconds = last["clock"]["monotonic"] - first["clock"]["monotonic"]
    return (last["step"] - first["step"]) / seconds


def once(work: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What `measure` gives, or has given in an earlier call."""
    file = work / "measured.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if name not in found:
        found[name] = measure()
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(file)
    return found[name]


def measure_kills(work: Path, name: str, kills: int) -> dict[str, Any]:
    """The figures of each kill of a run; of the large one also what a checkpoint costs."""
    kind, chance = KINDS[name], random.Random(name)
    kept: list[dict[str, float]] = []
    live = None
    count = max(1, round(kind.kills * kills))
    try:
        for number in range(count):
            key = f"{name} {number}"

            def measure() -> dict[str, float]:
                nonlocal live
                live = live or Live(work, name, kind)
                return kill_once(live, chance)

            kept.append(once(work, key, measure))

        def measure_saving() -> dict[str, float]:
            nonlocal live
            live = live or Live(work, name, kind)
            live.wait_for(lambda _: any(live.run.checkpoints.glob("step_*")))
            return saving(live)

        costs = once(work, f"{name} saving", measure_saving) if name == "large" else {}
    finally:
        if live is not None:
            live.stop()
    return {"kills": kept, "saving": costs}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "goodput")
    parser.add_argument("--out", type=Path, default=RESULTS / "goodput.json")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = {name: measure_kills(work, name, options.kills) for name in KINDS}
    minutely = once(work, "minutely", lambda: killed_every_minute(work, options.minutes))
    large = found["large"]
    costs = {
        **large["saving"],
        "restart": statistics.median(kill["to_first_step"] for kill in large["kills"]),
    }
    shares = hourly(costs)
    publish(
        options.out,
        "Kills and goodput",
        [kills_table(found), hourly_table(costs, shares), minutely_table(minutely)],
        {"measured": found, "costs": costs, "hourly": shares, "minutely": minutely},
    )
    held = [shares[f"killed, {interval:g} s"] >= limit for interval, limit in LIMITS.items()]
    return 0 if all(held) else 1


def hourly(costs: dict[str, float]) -> dict[str, float]:
    """The goodput at one kill an hour, by what is killed and by the interval of checkpoints."""
    return {
        f"{name}, {interval:g} s": goodput(interval, costs, found=seconds, every=HOUR)
        for name, seconds in NOTICED.items()
        for interval in INTERVALS
    }


def kills_table(found: dict[str, Any]) -> Table:
    """What a kill costs, by run."""
    rows = []
    for name, kind in KINDS.items():
        kills = found[name]["kills"]
        medians = [
            statistics.median(kill[key] for kill in kills)
            for key in ("to_first_step", "to_new_step", "steps", "tokens")
        ]
        times = [f"{seconds:.1f}" for seconds in medians[:2]]
        rows.append([kind.name, str(len(kills)), *times, *(f"{n:,.0f}" for n in medians[2:])])
    columns = ["run", "kills", "s to the first step", "s to a new step"]
    return Table(
        "kill -9 of one process; medians", [*columns, "steps repeated", "tokens repeated"], rows
    )


def hourly_table(costs: dict[str, float], shares: dict[str, float]) -> Table:
    """The sum of what one kill an hour costs."""
    rows = []
    for name, seconds in NOTICED.items():
        for interval in INTERVALS:
            saves = HOUR / interval
            rows.append(
                [
                    f"{name}, a checkpoint every {interval:g} s",
                    f"{interval / 2:g}",
                    f"{costs['whole']:.1f}",
                    f"{seconds:g}",
                    f"{costs['restart']:.1f}",
                    f"{saves:g} x {costs['hold']:.2f} = {saves * costs['hold']:.1f}",
                    f"{shares[f'{name}, {interval:g} s']:.2%}",
                    f"{LIMITS[interval]:.1%}" if name == "killed" else "-",
                ]
            )
    columns = ["", "half an interval, s", "until it is whole, s", "until it is noticed, s"]
    columns += ["restart, s", "saves, s", "goodput", "limit"]
    return Table("Goodput at one kill an hour, by the costs of the 1 GB run", columns, rows)


def minutely_table(found: dict[str, float]) -> Table:
    """What the run that was killed once a minute says of itself."""
    row = [
        f"{found['kills']:g}",
        f"{found['wall'] / MINUTE:.1f}",
        f"{found['restart']:.1f}",
        f"{found['interval']:.1f}",
        f"{found['goodput']:.1%}",
        f"{found['by_steps']:.1%}",
        f"{found['expected']:.1%}",
    ]
    columns = ["kills", "minutes", "restart, s", "interval, s", "goodput by its metrics"]
    columns += ["steps, of an unkilled run's", "by the sum above"]
    return Table("A small run, killed once a minute", columns, [row])


if __name__ == "__main__":
    sys.exit(main())
