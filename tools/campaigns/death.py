"""A run of two processes, of which one dies, stops or loops; how long the other needs to end.

    python tools/campaigns/death.py [--trials 33] [--out FILE]

Trials 0 to 29 have `parallel.timeout: 10`: SIGKILL, SIGSTOP and an endless loop, each for both
processes under five shardings, at a drawn step and phase. Trials 30 to 32 have 100. The other
process must end within the timeout and five seconds, with the exit code of a lost process, and its
line must begin with rank, host and process of the one that was struck, and name the step. Then the
next life of the run must come to the weights, the optimizer state and the metrics of the run to
which nothing happened, to the bit. The table has the seconds; `--only N` prints what was said.
"""

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.ranks import lives
from tools.campaigns.trials import Trial, campaign

KINDS = ("dead", "stopped", "looping")
SHARDINGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PHASES = ("data", "forward", "backward", "exchange", "save")
SHORT, LONG = 10, 100  # seconds of parallel.timeout
MORE = 5.0  # seconds after it
WHOLE = len(KINDS) * 2 * len(SHARDINGS)  # trials with the short one


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """Strike one process; the trial's own command goes on with the run."""
    kind, victim = KINDS[number % 3], number // 3 % 2
    sharding = SHARDINGS[number // 6 % len(SHARDINGS)]
    timeout = SHORT if number < WHOLE else LONG
    phase = chance.choice(PHASES)
    step = chance.choice([4, 6] if phase == "save" else [2, 3, 4, 5, 6, 7])
    reference = lives.whole(sharding)
    settings = [f"parallel.timeout={timeout}"]
    launcher = lives.begin(
        sharding, folder, *settings, strike=f"{kind}:{victim}:{step}:{phase}:{folder / 'struck'}"
    )
    seconds, wrong = _watched(folder, kind, victim)
    lives.ended(launcher, folder)
    said = [
        line
        for line in (folder / "err").read_text(errors="replace").splitlines()
        if line.startswith("llmnorm: error: ")
    ]
    if seconds is not None and seconds > timeout + MORE:
        wrong.append(f"ended {seconds:.1f} s after the stroke")
    start = f"llmnorm: error: rank {victim} (host {socket.gethostname()}, process "
    if len(said) != 1 or not said[0].startswith(start) or f"step {step}" not in said[0]:
        wrong.append(f"said {said}")
    figures = {"kind": kind, "victim": victim, "sharding": sharding, "timeout": timeout}
    figures |= {"struck": f"step {step}, {phase}", "ended": seconds, "said": said}
    what = f"{kind} rank {victim} under {sharding}, step {step}, {phase}, timeout {timeout}: {said}"
    return lives.trial(what, sharding, settings, folder, wrong, reference, figures)


def _watched(folder: Path, kind: str, victim: int) -> tuple[float | None, list[str]]:
    """Seconds from the stroke to the end of the other process, and what was wrong until then."""
    struck, until = folder / "struck", time.monotonic() + lives.PATIENCE
    while not struck.exists():
        if time.monotonic() > until:
            return None, ["nothing was struck"]
        time.sleep(0.005)
    numbers = lives.ranks(folder)
    while lives.runs(numbers[1 - victim]):
        if time.monotonic() > until:
            return None, [f"rank {1 - victim} did not end"]
        time.sleep(0.005)
    seconds = time.monotonic() - float(struck.read_text())
    if kind == "stopped":  # nothing ends it but this
        os.kill(numbers[victim], signal.SIGKILL)
    return seconds, []


def table(records: list[dict[str, Any]]) -> str:
    """Seconds from the stroke to the end, a row for each kind, victim and timeout."""
    rows = ["what      victim  timeout  trials  median s  longest s  failed"]
    found: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for record in records:
        figures = record["figures"]
        key = (figures["timeout"], figures["kind"], figures["victim"])
        found.setdefault(key, []).append(record)
    for (timeout, kind, victim), those in sorted(found.items()):
        seconds = [r["figures"]["ended"] for r in those if r["figures"]["ended"] is not None]
        times = f"{median(seconds):8.1f}  {max(seconds):9.1f}" if seconds else f"{'-':>8}  {'-':>9}"
        failed = sum(bool(record["wrong"]) for record in those)
        rows.append(f"{kind:8}  rank {victim}  {timeout:5} s  {len(those):6}  {times}  {failed:6}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(campaign("death", make, default=WHOLE + 3, about=str(__doc__), report=table))
