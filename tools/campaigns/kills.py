"""kill -9 at random moments of small runs, which are then gone on with.

    python tools/campaigns/kills.py [--out FILE]

The runs have two stages of data, so that kills come before and behind their boundary. Of 115
trials, 100 kill a run of one process once; 10 kill one of two processes under FSDP2, and 5 under
ZeRO-2, three times each, before it may end: one process or both. A third of the kills come inside a
save: the run is held (SIGSTOP) when the files of an unfinished checkpoint are there, and
killed if they still are. At the end the weights, the optimizer state and the metrics must be those
of the run that was not killed, to the bit. No kill may cost more steps than lie between two
checkpoints.

The table at the end says what a kill costs: from the kill to the first step that had not been done
before, and the tokens that were trained on twice. Most lives are forks of the campaign, which has
torch imported; every tenth trial ends with a real command.
"""

import json
import os
import random
import signal
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.ranks import lives
from tools.campaigns.ranks.launcher import CODES
from tools.campaigns.signals import STEPS
from tools.campaigns.trials import Result, Trial, campaign

TURN = 23  # trials, of which two are under FSDP2, one is under ZeRO-2, the others of one process
TRIES = 20  # for a kill that was to come inside a save, or before the run's end


class Kill(NamedTuple):
    """One that has come while the run was running.

    Attributes:
        moment: by the monotonic clock.
        step: the last step in metrics.jsonl.
        tokens: trained on until then.
        inside: the checkpoint under way was left unfinished.
    """

    moment: float
    step: int
    tokens: int
    inside: bool


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """Kill a run, once or three times; the trial's own command goes on with it."""
    sharding = {1: "fsdp2", 12: "fsdp2", 22: "zero2"}.get(number % TURN, "none")
    count, processes = (1, 1) if sharding == "none" else (3, 2)
    reference = lives.whole(sharding)
    killed: list[dict[str, Any]] = []
    wrong: list[str] = []
    for nth in range(count):
        inside = (number + nth) % 3 == 0
        # The later of three kills must find something left to do.
        latest = STEPS - 2 if sharding == "none" else (nth + 1) * (STEPS - 2) // count
        for _ in range(TRIES):
            victim = "0" if sharding == "none" else chance.choice(["0", "1", "all"])
            launcher = lives.begin(sharding, folder)
            found = _kill(folder, launcher, victim, chance, latest, processes, inside=inside)
            code = lives.ended(launcher, folder)
            if code is None:
                wrong.append(f"what was left did not end in {lives.PATIENCE:.0f} s")
            elif found is not None and sharding != "none":
                wrong += lives.wrong_codes(json.loads((folder / CODES).read_text()), victim)
            if found is not None:
                step, tokens = lives.saved(folder)
                if found.step - step > lives.EVERY:
                    wrong.append(f"killed at step {found.step}, the newest checkpoint is {step}")
                killed.append({**found._asdict(), "tokens_twice": max(0, found.tokens - tokens)})
                break
            if (folder / "run" / "DONE").exists():
                wrong.append(f"the run has ended before kill {nth + 1} of {count}")
                break
    figures = {"sharding": sharding, "kills": killed}
    moments = ", ".join(
        f"{kill['step']}{' (inside a save)' if kill['inside'] else ''}" for kill in killed
    )
    return Trial(
        f"{sharding}, killed after step {moments}",
        lives.words(sharding),
        folder,
        names=[],
        codes=(0,),
        check=partial(_judged, wrong, folder, reference, killed),
        times=lives.TIMES,
        script=lives.script(sharding),
        figures=figures,
    )


def _kill(
    folder: Path,
    launcher: int,
    victim: str,
    chance: random.Random,
    latest: int,
    processes: int,
    *,
    inside: bool,
) -> Kill | None:
    """Kill the victim at a random moment; None where the run ends before.

    Args:
        victim: "0", "1" or "all".
        latest: the kill comes while no more steps than these are logged.
        processes: of the run.
        inside: kill inside a save.
    """
    run = folder / "run"
    done = max(lives.steps_of(run), default=0)
    goal = chance.randint(min(done, latest), latest)
    wait = chance.uniform(0, 0.2 if goal else 1.5)  # before the first line a run prepares
    numbers: list[int] = []
    while (
        len(numbers) < processes
        or max(lives.steps_of(run), default=0) < goal
        or (inside and not _saving(run))
    ):
        if not lives.runs(launcher):
            return None
        numbers = [launcher] if processes == 1 else lives.ranks(folder)
        time.sleep(0.0005)
    if not inside:
        time.sleep(wait)
    for number in numbers:
        _send(number, signal.SIGSTOP)
    if not lives.runs(launcher) or (inside and not _saving(run)):
        for number in numbers:
            _send(number, signal.SIGCONT)
        if not inside or not lives.runs(launcher):
            return None
        return _kill(folder, launcher, victim, chance, latest, processes, inside=inside)
    unfinished, steps = _saving(run), lives.steps_of(run)
    for rank, number in enumerate(numbers):
        kills = victim in (str(rank), "all")
        _send(number, signal.SIGKILL if kills else signal.SIGCONT)
    last = max(steps, default=0)
    return Kill(time.monotonic(), last, steps.get(last, 0), unfinished)


def _send(process: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended."""
    if lives.runs(process):
        os.kill(process, number)


def _saving(run: Path) -> bool:
    """Whether there is a checkpoint that is not finished."""
    return any((run / "checkpoints").glob(".tmp-step_*"))


def _judged(
    wrong: list[str], folder: Path, reference: Path, killed: list[dict[str, Any]], result: Result
) -> list[str]:
    """What is not as in the run that was not killed; the kills get their `seconds`."""
    if result.code == 0:
        lines = [
            json.loads(line)
            for name in ("metrics.jsonl", "metrics.repeated.jsonl")
            for line in _lines(folder / "run" / name)
        ]
        ends = [kill["moment"] for kill in killed[1:]] + [float("inf")]
        for kill, end in zip(killed, ends, strict=True):
            moments = [line["clock"]["monotonic"] for line in lines if line["step"] > kill["step"]]
            new = min((moment for moment in moments if kill["moment"] < moment < end), default=None)
            kill["seconds"] = None if new is None else round(new - kill["moment"], 3)
    return lives.as_if_nothing(wrong, folder, reference, result)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def report(records: list[dict[str, Any]]) -> str:
    """The table of what the kills have cost."""
    rows = [["", "kills", "inside a save", "seconds to a new step", "(longest)", "tokens twice"]]
    kinds = [("none", "one process"), ("fsdp2", "FSDP2, two"), ("zero2", "ZeRO-2, two")]
    for sharding, name in kinds:
        for real, ending in ((False, ", forked"), (True, ", a real command")):
            # Of a real command the last life alone is one; the lives before it are forks.
            kills = [
                kill
                for record in records
                if record["figures"]["sharding"] == sharding
                for kill in record["figures"]["kills"]
                if real == (record["real"] and kill is record["figures"]["kills"][-1])
            ]
            seconds = [kill["seconds"] for kill in kills if kill.get("seconds") is not None]
            if kills:
                rows.append(
                    [
                        name + ending,
                        str(len(kills)),
                        str(sum(kill["inside"] for kill in kills)),
                        f"{statistics.median(seconds):.2f}" if seconds else "-",
                        f"{max(seconds):.2f}" if seconds else "-",
                        f"{statistics.median(kill['tokens_twice'] for kill in kills):g}",
                    ]
                )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(campaign("kills", make, default=5 * TURN, about=str(__doc__), report=report))
