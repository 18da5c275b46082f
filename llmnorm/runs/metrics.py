"""What a run writes while it trains: metrics.jsonl, samples.jsonl, trackers, the progress bar.

metrics.jsonl has a line for each logged step (`step`, `tokens`, `loss`, `grad_norm`, `lr`,
`tokens_per_second`, ..., at intervals `health`) and one for each evaluation (`step`, `tokens`,
`validation`, and `tasks` where lm-eval's tasks were scored). Losses are in nats per token. Both say
what the time since the last line was spent on (account.py). samples.jsonl has a line for each
evaluation (`step`, `tokens`, `samples`). A number that is not finite is null (`machine/files.py`).

What would surprise: on resume both files are cut to the checkpoint's step (lines.py), so that they
read as if the run had not stopped. The lines that are taken back go to metrics.repeated.jsonl.
"""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from tqdm import tqdm

from llmnorm.machine.files import json_text
from llmnorm.objectives.benchmark_tasks import sentence as in_a_sentence
from llmnorm.objectives.figures import sentence
from llmnorm.part import InputError
from llmnorm.runs.account import Timekeeper
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import Cut, append_whole, plan_cut
from llmnorm.runs.trackers import Trackers

# Dense bf16 peak of one GPU in FLOP/s, from the vendors' data sheets, by a part of the device's
# name; the first match counts. The MFU of other hardware is shown as unknown, not estimated.
PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: what torch has allocated on a GPU, what the process used on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


class Kept(NamedTuple):
    """What a run that goes on from a step keeps of its two files.

    Attributes:
        repeated: where lines of metrics.jsonl go that are taken back.
        metrics, samples: of each file.
        validation_loss: of that very step in metrics.jsonl; None where it was not evaluated.
    """

    repeated: Path
    metrics: Cut
    samples: Cut
    validation_loss: float | None

    def apply(self) -> None:
        """Take the lines past the step back, and keep damaged ones aside.

        Raises:
            InputError: a file cannot be written.
        """
        with _explained(self.repeated):
            append_whole(self.repeated, [entry.raw for entry in self.metrics.past])
        for each in (self.metrics, self.samples):
            with _explained(each.path):
                each.apply()

    def notes(self) -> list[str]:
        """What was lost of the files, and which steps are trained again, in sentences."""
        notes = [*self.metrics.notes(), *self.samples.notes()]
        again = [entry.step for entry in self.metrics.past if entry.step > self.metrics.step]
        if again:
            steps = (
                f"step {again[0]} is"
                if again[0] == again[-1]
                else f"the steps {again[0]} to {again[-1]} are"
            )
            notes.append(f"{self.metrics.path}: {steps} past the checkpoint and trained again")
        return notes


def keep_until(run: RunDirectory, step: int) -> Kept:
    """What a run that goes on from `step` keeps of its files; nothing is written.

    An evaluation's line follows its samples. Where the step's own evaluation is not there, a kill
    has come between, so its samples are not kept either: it is evaluated again.

    Raises:
        InputError: a file cannot be read.
    """
    metrics = plan_cut(run.metrics, step)
    loss = None
    for entry in metrics.kept:
        if entry.step == step and isinstance(figures := entry.value.get("validation"), dict):
            found = figures.get("loss")
            loss = float(found) if isinstance(found, int | float) else math.nan
    samples = plan_cut(run.samples, step if loss is not None else step - 1)
    return Kept(run.repeated, metrics, samples, loss)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the disk into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; "
            "the run goes on from its newest checkpoint when it can"
        ) from None


class Metrics:
    """Context manager of a run's metrics files and progress bar.

    Args:
        run: where metrics.jsonl and samples.jsonl are.
        trackers: get every line too.
        steps, start: length of the run, and the step that it starts or resumes at.
        flops_per_token: of the forward and backward pass, for the MFU.
        world: processes, for the MFU.
        enabled: whether this is the main process; the others write and print nothing.
        timekeeper: says what the time of each line was spent on.
        seconds: training time of the run's earlier processes.
    """

    def __init__(
        self,
        run: RunDirectory,
        trackers: Trackers,
        *,
        steps: int,
        start: int,
        flops_per_token: float,
        device: torch.device,
        world: int,
        enabled: bool,
        timekeeper: Timekeeper,
        seconds: float = 0.0,
    ) -> None:
        """Open metrics.jsonl for appending and draw the bar."""
        self._run, self._trackers = run, trackers
        with _explained(run.metrics):
            self._file = run.metrics.open("a", encoding="utf-8") if enabled else None
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not enabled,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        peak = peak_flops(device)
        self._flops_share = flops_per_token / (peak * world) if peak else None
        self._device, self._timekeeper = device, timekeeper
        self._seconds_before = seconds
        self._started = self._last = time.perf_counter()
        self._tokens_since = 0

    def __enter__(self) -> Self:
        """The metrics themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close metrics.jsonl; the bar stays on the screen."""
        self._bar.close()
        if self._file:
            with suppress(OSError):  # every line was flushed: an error has been raised already
                self._file.close()

    @property
    def seconds(self) -> float:
        """Training time of the run so far, that of earlier processes included."""
        return self._seconds_before + time.perf_counter() - self._started

    def count(self, tokens: int, loss: float) -> None:
        """Move the bar by one step.

        Args:
            tokens: trained on in the step, over all processes.
            loss: the step's mean.
        """
        self._tokens_since += tokens
        self._bar.set_postfix_str(self._postfix(loss), refresh=False)
        self._bar.update()

    def log_step(self, record: dict[str, Any]) -> None:
        """Write a step's line; its rate is over the steps since the last line."""
        now = time.perf_counter()
        rate = self._tokens_since / max(now - self._last, 1e-9)
        self._last, self._tokens_since = now, 0
        mfu = rate * self._flops_share if self._flops_share else None
        self._write(
            {
                **record,
                "tokens_per_second": rate,
                "mfu": mfu,
                "memory_bytes": peak_memory(self._device),
                "seconds": self.seconds,
            }
        )

    def log_evaluation(
        self,
        step: int,
        tokens: int,
        figures: dict[str, Any],
        samples: list[dict[str, str]],
        tasks: dict[str, Any],
    ) -> None:
        """Write an evaluation into both files and print it above the bar.

        The line of metrics.jsonl comes last: where it is, the evaluation is whole (`keep_until`).

        Args:
            tasks: scores under "tasks", and under "ema_tasks" those of the moving average; empty
                where none were taken.
        """
        if self._file and samples:
            line = {"step": step, "tokens": tokens, "samples": samples}
            text = json_text(line, ascii=False)
            with (
                _explained(self._run.samples),
                self._run.samples.open("a", encoding="utf-8") as file,
            ):
                file.write(text + "\n")
            self._trackers.log(line)
        line = {"step": step, "tokens": tokens, "validation": figures, **tasks}
        self._write({**line, "seconds": self.seconds})
        self.say(f"step {step}: validation {sentence(figures)}")
        for name, found in tasks.items():
            self.say(f"step {step}: {name.replace('_', ' ')} {in_a_sentence(found)}")
        for sample in samples:
            right = f" ({_short(sample['reference'])})" if "reference" in sample else ""
            self.say(f"  {_short(sample['prompt'])} → {_short(sample['continuation'])}{right}")

    def say(self, text: str) -> None:
        """Print a line above the bar, on the main process alone."""
        if self._file:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager around what is not training: its time does not count in the rate."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def _postfix(self, loss: float) -> str:
        rate = self._tokens_since / max(time.perf_counter() - self._last, 1e-9)
        mfu = f"{rate * self._flops_share:.1%}" if self._flops_share else "unknown"
        return f"loss {loss:.4f}, {rate:,.0f} tokens/s, MFU {mfu}"

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            record = record | self._timekeeper.line()
            with _explained(self._run.metrics):
                self._file.write(json_text(record) + "\n")
                self._file.flush()
            self._trackers.log(record)


def _short(text: str, longest: int = 120) -> str:
    """A text on one line, cut to `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
