"""What a run writes while it trains: metrics.jsonl, samples.jsonl, trackers, the progress bar.

metrics.jsonl has a line for each logged step (`step`, `tokens`, `loss`, `grad_norm`, `lr`,
`tokens_per_second`, ..., at intervals `health`) and one for each evaluation (`step`, `tokens`,
`validation`). Losses are in nats per token. samples.jsonl has a line for each evaluation (`step`,
`tokens`, `samples`).

What would surprise: on resume both files are cut to the checkpoint's step, so that they read as if
the run had not stopped.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from llmnorm.objectives.figures import sentence
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
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


def cut(run: RunDirectory, step: int) -> None:
    """Remove the lines past `step`, and a half-written last line, from a run's two files."""
    for path in (run.metrics, run.samples):
        if path.exists():
            _cut(path, step)


def _cut(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # a killed process has left half of this line, and nothing can follow it
    temporary = path.with_suffix(".tmp")
    with _explained(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


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
        self._device = device
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

    def log_evaluation(self, step: int, tokens: int, figures: dict[str, Any]) -> None:
        """Write an evaluation's line and print it above the bar."""
        self._write(
            {"step": step, "tokens": tokens, "validation": figures, "seconds": self.seconds}
        )
        self.say(f"step {step}: validation {sentence(figures)}")

    def log_samples(self, step: int, tokens: int, samples: list[dict[str, str]]) -> None:
        """Write generated texts into samples.jsonl and print them above the bar."""
        if not (self._file and samples):
            return
        line = {"step": step, "tokens": tokens, "samples": samples}
        with _explained(self._run.samples), self._run.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._trackers.log(line)
        for sample in samples:
            self.say(f"  {_short(sample['prompt'])} → {_short(sample['continuation'])}")

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
            with _explained(self._run.metrics):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            self._trackers.log(record)


def _short(text: str, longest: int = 120) -> str:
    """A text on one line, cut to `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
