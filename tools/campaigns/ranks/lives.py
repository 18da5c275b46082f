"""The lives of a run that is killed again and again, and the run that is not.

launcher = begin(words("fsdp2"), folder)    two processes of a run in folder/run
kill_inside_a_save(...), kill_after(...)    what ends them
ended(launcher, folder)                     waits until all of them are gone
as_if_nothing(...)                          what differs from the run that was not killed
"""

import json
import os
import shutil
import signal
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

from tools.campaigns.ranks.launcher import CODES, PIDS
from tools.campaigns.ranks.moments import REACHED
from tools.campaigns.signals import newest, prepared, same_end
from tools.campaigns.trials import Result, Trial, start

LAUNCHER = "tools.campaigns.ranks.launcher"
EVERY = 2  # steps between two checkpoints
LOST = 74  # exit code of a process that has lost another
PATIENCE = 600.0  # seconds after which what is left of a killed run counts as hung
TIMES = 15.0  # of a trial's usual limit: two processes begin, perhaps on one processor


def words(sharding: str, *more: str) -> list[str]:
    """The command of a run, for the launcher if there are two processes.

    Several processes prepare no data by themselves, and its identity holds where its text lies, so
    all runs of a campaign read the same.

    Args:
        sharding: "none" is one process, which needs no launcher.
        more: settings.
    """
    places = ", ".join(f"{{name: {n}, path: {prepared() / n}.txt}}" for n in ("text", "more"))
    sources = [f"data.sources=[{places}]", f"data.dir={prepared() / 'data'}"]
    settings = ["optimizer=muon", f"checkpoint.every={EVERY}", f"parallel.sharding={sharding}"]
    command = ["train", str(prepared() / "run.yaml"), "run_dir=run", *sources, *settings, *more]
    return command if sharding == "none" else ["2", *command]


def script(sharding: str) -> str | None:
    """What runs `words(sharding)`, for a `Trial`."""
    return None if sharding == "none" else LAUNCHER


@cache
def whole(sharding: str) -> Path:
    """The folder of the run that is not killed."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-whole-"))
    code = ended(begin(sharding, folder), folder)
    assert code == 0, f"the run that is not killed ended with {code}: {folder}"
    return folder


def begin(sharding: str, folder: Path, *more: str, kill_at: str = "", strike: str = "") -> int:
    """Start a life of the run in `folder`; returns the number of its launcher, or its own."""
    shutil.rmtree(folder / PIDS, ignore_errors=True)
    for name in (CODES, REACHED):
        (folder / name).unlink(missing_ok=True)
    command, environment = words(sharding, *more), {"KILL_AT": kill_at, "STRIKE": strike}
    with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
        return start(
            command,
            folder,
            out,
            err,
            real=False,
            environment=environment,
            script=script(sharding),
        )


def ended(launcher: int, folder: Path) -> int | None:
    """The launcher's exit code, once all of its processes are gone; None if they do not go.

    What is left then is killed, so that no trial leaves a process behind.
    """
    limit = time.monotonic() + PATIENCE
    code = None
    while time.monotonic() < limit:
        if code is None:
            found, status = os.waitpid(launcher, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if found else None
        if code is not None and not any(map(runs, ranks(folder))):
            return code
        time.sleep(0.005)
    os.killpg(launcher, signal.SIGKILL)  # its session, which is that of its processes too
    return None


def ranks(folder: Path) -> list[int]:
    """The numbers of the processes that a launcher has started in `folder`."""
    return [int(path.read_text()) for path in sorted((folder / PIDS).glob("[0-9]"))]


def runs(process: int) -> bool:
    """Whether a process is there; one that has ended and was not waited for is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wrong_codes(codes: list[int], victim: str) -> list[str]:
    """What is wrong with how two processes ended, of which "0", "1" or "all" were killed."""
    wrong = []
    for rank, code in enumerate(codes):
        expected = -signal.SIGKILL if victim in (str(rank), "all") else LOST
        if code != expected:
            wrong.append(f"rank {rank} ended with {code}, not {expected}")
    return wrong


def steps_of(run: Path) -> dict[int, int]:
    """The logged steps of a run, and the tokens that it had been trained on after each."""
    path = run / "metrics.jsonl"
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {line["step"]: line["tokens"] for line in found if "loss" in line}


def trial(
    what: str,
    sharding: str,
    settings: list[str],
    folder: Path,
    wrong: list[str],
    reference: Path,
    figures: dict[str, Any] | None = None,
) -> Trial:
    """The life in which a struck run is to end as if nothing had happened; `as_if_nothing`."""
    return Trial(
        what,
        words(sharding, *settings),
        folder,
        names=[],
        codes=(0,),
        check=partial(as_if_nothing, wrong, folder, reference),
        times=TIMES,
        script=script(sharding),
        figures=figures or {},
    )


def as_if_nothing(wrong: list[str], folder: Path, reference: Path, result: Result) -> list[str]:
    """What is not as in the run that was not killed, besides what was `wrong` before."""
    found = same_end(wrong, folder, reference, result)
    if result.code == 0:
        ours, theirs = (
            sorted(os.listdir(place / "run" / "checkpoints")) for place in (folder, reference)
        )
        if ours != theirs:
            found.append(f"checkpoints/ holds {ours}, not {theirs}")
    return found


def saved(folder: Path) -> tuple[int, int]:
    """The step of the newest checkpoint of the run in `folder`, and the tokens trained on by then.

    (0, 0) where there is none.
    """
    run = folder / "run"
    step = newest(run)
    return step, steps_of(run)[step] if step else 0
