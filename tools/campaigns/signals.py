"""Signals at random moments of a small run, which is then gone on with.

    python tools/campaigns/signals.py --trials 60 [--out FILE]

Each trial starts a run and sends it one signal: at a moment drawn over the whole of an
uninterrupted run, or as soon as something is seen in the run directory (a save under way, the last
step's line). It judges exit code and output of the stopped process, then goes on to the end. The
metrics, the samples and the last checkpoint must be those of the run that was not stopped, to the
bit.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.runs.lines import read_lines
from llmnorm.training.signals import EXIT_CODES
from tools.campaigns.trials import SECONDS, Result, Trial, campaign, command, start

STEPS = 12
TIMES = (
    *("seconds", "tokens_per_second", "mfu", "memory_bytes"),
    *("spent", "wall", "goodput", "clock"),
)
CONFIG = """
data:
  sources: [{name: text, path: text.txt}, {name: more, path: more.txt}]
  stages: [{until: 0.4, weights: {text: 2, more: 1}}, {weights: {more: 1}}]
  context_length: 32
  dir: data
tokenizer: {vocab_size: 300}
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, tie_word_embeddings: true}
training: {steps: 12, global_batch: 4, ema: 0.9}
evaluation: {every: 4, samples: 1, sample_tokens: 4, micro_batch: 16}
"""
WORDS = ["train", "run.yaml", "run_dir=run"]
# What is seen in the run directory before the signal is sent; None: a moment by the clock.
MOMENTS = ("clock", "clock", "line", "evaluation", "save", "last line")
START = 0.6  # seconds of a command in which Python itself has not started yet


class Whole(NamedTuple):
    """The run that was not stopped.

    Attributes:
        folder: where it lies, with its prepared data.
        seconds: how long it took, without the start of Python.
    """

    folder: Path
    seconds: float


@cache
def prepared() -> Path:
    """A folder with configuration, text and prepared data alone."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-signals-data-"))
    chance = random.Random(5)
    words = ["river", "stone", "light", "green", "under", "window", "paper", "walked", "and"]
    text = "\n\n".join(" ".join(chance.choices(words, k=60)) for _ in range(500))
    (folder / "text.txt").write_text(text)
    (folder / "more.txt").write_text("\n\n".join(reversed(text.split("\n\n")[:200])))
    (folder / "run.yaml").write_text(CONFIG)
    result = command(["data", "run.yaml"], folder, seconds=300)
    assert result.code == 0, result.err
    return folder


@cache
def whole(every: str) -> Whole:
    """The uninterrupted run with this `checkpoint.every`."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-signals-whole-"))
    shutil.copytree(prepared(), folder, dirs_exist_ok=True)
    started = time.monotonic()
    result = command([*WORDS, f"checkpoint.every={every}"], folder, seconds=300)
    taken = time.monotonic() - started
    assert result.code == 0, f"the run that is not stopped ended with {result.code}: {folder}"
    return Whole(folder, taken)


@cache
def start_up() -> float:
    """Seconds that Python and the imports of a real command take."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import llmnorm.training.loop"], check=True)
    return time.monotonic() - began


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """Stop a run by one signal; the trial's own command goes on with it.

    What is stopped at a moment by the clock is a real command, since the moment may lie in its
    imports; what is stopped at a sight is a fork, as most trials are.
    """
    every = chance.choice(["null", "1", "3"])
    kind = chance.choice([*EXIT_CODES, signal.SIGKILL])
    moment = chance.choice(MOMENTS)
    real = moment == "clock"
    reference = whole(every)
    shutil.copytree(prepared(), folder, dirs_exist_ok=True)
    latest = reference.seconds + start_up() if real else 0.1
    wait = chance.uniform(START if real else 0, latest)
    words = [*WORDS, f"checkpoint.every={every}"]
    with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
        process = start(words, folder, out, err, real=real)
    code = None
    while code is None and not _seen(folder / "run", moment):
        code = _ended(process)
        time.sleep(0.001)
    time.sleep(wait)
    code = _ended(process) if code is None else code
    alive = code is None
    sent = time.monotonic()
    if code is None:
        os.kill(process, kind)
        while (code := _ended(process)) is None:
            assert time.monotonic() < sent + 4 * SECONDS, f"{kind.name} is not answered: {folder}"
            time.sleep(0.001)
    wrong = _judged(kind, code, alive, folder, time.monotonic() - sent)
    step = newest(folder / "run")
    what = f"{kind.name} at {moment} + {wait:.2f} s, checkpoint.every={every}: {code}, saved {step}"
    return Trial(
        what,
        words,
        folder,
        names=[],
        codes=(0,),
        check=partial(same_end, wrong, folder, reference.folder),
    )


def _ended(process: int) -> int | None:
    """The exit code of a process that has ended; minus a signal's number; else None."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _seen(run: Path, moment: str) -> bool:
    """Whether the moment has come that a signal waits for."""
    record = run / "metrics.jsonl"
    text = record.read_text() if moment != "clock" and record.exists() else ""
    match moment:
        case "line":
            return bool(text)
        case "evaluation":  # of step 4: its line of training is there, that of validation is not
            return '"step": 4,' in text
        case "save":
            return (run / "checkpoints").exists()
        case "last line":
            return f'"step": {STEPS},' in text
    return True


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 where there is none."""
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")), default=0)


def _judged(
    kind: signal.Signals, code: int, alive: bool, folder: Path, seconds: float
) -> list[str]:
    """What is wrong with the stopped process."""
    out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
    wrong = []
    ended = (folder / "run" / "DONE").exists()
    if kind == signal.SIGKILL:
        allowed = {-signal.SIGKILL, *([0] if ended else [])}
    else:
        # After its end a run may be hit while Python leaves: nothing is left to save.
        allowed = {0, -kind} if ended else {EXIT_CODES[kind]}
        if seconds > SECONDS / 4 and alive:
            wrong.append(f"{kind.name} was answered after {seconds:.1f} s")
    if alive and code not in allowed:
        wrong.append(f"exit code {code} after {kind.name}, allowed {sorted(allowed)}")
    if "Traceback" in out + err:
        wrong.append("a traceback")
    if alive and code > 0:
        said = [line for line in (out + err).split("\n") if "stopped by" in line]
        if len(said) != 1 or kind.name not in said[0]:
            wrong.append(f"said {said}")
        sign = folder / "run" / "PREEMPT"
        if (
            said
            and "saved;" in said[0]
            and (not sign.exists() or int(sign.read_text()) != newest(folder / "run"))
        ):
            wrong.append("PREEMPT is not the newest checkpoint's step")
    return wrong


def same_end(wrong: list[str], folder: Path, reference: Path, result: Result) -> list[str]:
    """What is not as in the run that was not stopped."""
    if result.code:
        return wrong
    found = list(wrong)
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = (read_lines(place / "run" / name) for place in (folder, reference))
        if ours.damaged or ours.unfinished:
            found.append(f"{name} is damaged")
        if _numbers(ours.entries) != _numbers(theirs.entries):
            found.append(f"{name} differs")
    last = f"run/checkpoints/step_{STEPS:08d}"
    one, other = (read_checkpoint(place / last).manifest for place in (folder, reference))
    if one["validation_loss"] != other["validation_loss"]:
        found.append("the last checkpoint has another validation loss")
    files = [sorted((place / last).glob("*.safetensors")) for place in (folder, reference)]
    if [p.read_bytes() for p in files[0]] != [p.read_bytes() for p in files[1]]:
        found.append("the last checkpoint has other numbers")
    left = [p.name for p in (folder / "run/checkpoints").iterdir() if p.name.startswith(".")]
    found += [f"{name} is left" for name in left]
    signs = [name for name in ("PREEMPT", "DIVERGED") if (folder / "run" / name).exists()]
    return found + [f"{name} is left" for name in signs]


def _numbers(entries: list) -> list[dict]:
    return [{k: v for k, v in entry.value.items() if k not in TIMES} for entry in entries]


if __name__ == "__main__":
    sys.exit(campaign("signals", make, default=60, about=str(__doc__)))
