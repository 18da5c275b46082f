"""`llmnorm train CONFIG --profile`: what a few steps of a run spend their time or memory on.

    --profile           torch's profiler: RUN/profile/steps_3-5.json (a trace for
                        https://ui.perfetto.dev) and a table of the slowest operations
    --profile memory    on a GPU RUN/profile/memory_steps_3-5.pickle, the allocator's history, for
                        https://docs.pytorch.org/memory_viz; on a CPU the profiler's trace with
                        every allocation, and a table of the operations that allocated most

The first two steps are not profiled, since caches and lazy set-up would distort them. The run goes
on afterwards; profiling does not change its numbers. Only the main process is profiled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from llmnorm.part import InputError

KINDS = ("time", "memory")
SKIPPED, RECORDED = 2, 3  # steps
ROWS = 15  # of the table
ALLOCATIONS = 1_000_000  # kept of the allocator's history


class Profiler:
    """Context manager whose `step` must be called after every step.

    Args:
        kind: one of KINDS; None: nothing is profiled.
        directory: where the files go.
        start, steps: the step that the run starts or resumes at, and its length.
        say: prints a text for the user.

    Raises:
        InputError: the run has fewer steps left than profiling takes.
    """

    def __init__(
        self,
        kind: str | None,
        directory: Path,
        *,
        device: torch.device,
        start: int,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._kind, self._device, self._say = kind, device, say
        self._first, self._last = start + SKIPPED + 1, start + SKIPPED + RECORDED
        self._done = start
        self._directory = directory
        self._profile: Any = None
        if kind and steps < self._last:
            raise InputError(
                f"--profile: takes {SKIPPED + RECORDED} steps, the run has {steps - start} left"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop a recording that an error or a signal has cut off; it is not written."""
        if self._kind and self._first - 1 <= self._done < self._last:
            self._stop()

    def step(self) -> None:
        """Start, go on with, or finish the recording, after a step of the run."""
        if self._kind is None:
            return
        self._done += 1
        if self._done == self._first - 1:
            self._start()
        elif self._done == self._last:
            self._write()

    @property
    def _snapshot(self) -> bool:
        return self._kind == "memory" and self._device.type == "cuda"

    def _start(self) -> None:
        if self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            profile_memory=self._kind == "memory",
            acc_events=True,
        )
        self._profile.start()

    def _stop(self) -> None:
        if self._snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            self._profile.stop()

    def _write(self) -> None:
        prefix = "memory_steps" if self._kind == "memory" else "steps"
        suffix = "pickle" if self._snapshot else "json"
        path = self._directory / f"{prefix}_{self._first}-{self._last}.{suffix}"
        temporary = path.with_name(f".writing-{path.name}")
        table = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._snapshot:
                torch.cuda.synchronize(self._device)
                torch.cuda.memory._dump_snapshot(str(temporary))
                self._stop()
            else:
                self._stop()
                self._profile.export_chrome_trace(str(temporary))
                table = self._profile.key_averages().table(
                    sort_by=self._order(), row_limit=ROWS, max_name_column_width=50
                )
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        self._say(f"{table}profile of steps {self._first} to {self._last}: {path}")

    def _order(self) -> str:
        if self._kind == "memory":
            return "self_cpu_memory_usage"
        return f"self_{self._device.type}_time_total"
