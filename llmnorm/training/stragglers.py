"""Which process holds the others up.

Processes wait for each other in every step, so all of them take the same time for it. What differs
is how much of it a process works: reads rows, computes, writes lines. The one that the others wait
for works all the time. So each process adds up its own seconds of a step, without its waits, and
they travel in the step's one reduction.

Over 50 steps, a process is slow if its own seconds are more than 1.5 times the median of all, and
more than half of the time that the steps took. The second is for steps whose time is spent on a
GPU, where the few seconds of the hosts hold nobody up.

What would surprise:
- Of an even number of processes the median is the lower of the two in the middle. Of two processes
  it is the faster one's time, so that the other can be slow; of their mean it never could be 1.5
  times as much until it was three times as slow.
- On GPUs a host does not wait for collective calls, and its own seconds are those of the host:
  rows, Python, files. There a slow GPU is not found. Nor is a slow process under ZeRO, where
  DeepSpeed waits inside the phases of a step, and every process seems to work all the time; nor
  one replica of hsdp by another, whose sums are not told apart.
- The first step is left out, with all that precedes it.
"""

import statistics
from typing import Any

from torch import Tensor

from llmnorm.parallel.processes import Parallel

STEPS = 50
SLOW = 1.5  # times the median of all processes


class Stragglers:
    """Hears the own seconds of all processes in every step.

    Attributes:
        counts: by rank, in how many stretches of 50 steps it was slow; since this process began.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.counts: dict[int, int] = {}
        self._parallel, self._phases = parallel, parallel.phases
        self._before = 0.0
        self._sums: list[float] | None = None
        self._first = 0
        self._taken = 0.0
        self._notes: list[str] = []

    def slots(self, like: Tensor) -> Tensor:
        """One number for each process, 0 but its own: the seconds that it worked since the last.

        Args:
            like: 0-dim; of this dtype and on this device. The host does not wait for it.

        Returns:
            (world,), to be summed over all processes; (0,) of one process.
        """
        if self._parallel.world == 1:
            return like.new_empty(0)
        own = self._phases.own()
        mine, self._before = own - self._before, own
        found = like.new_zeros(self._parallel.world)
        found[self._parallel.rank] = mine
        return found

    def hear(self, seconds: list[float], step: int) -> None:
        """Take in the own seconds of all processes in this step."""
        if self._sums is not None:
            self._sums = [a + b for a, b in zip(self._sums, seconds, strict=True)]
            if step - self._first + 1 < STEPS:
                return
            self._judge(self._sums, step)
        self._sums, self._first = [0.0] * len(seconds), step + 1
        self._taken = self._phases.of_steps()

    def notes(self) -> list[str]:
        """What is to be said once."""
        notes, self._notes = self._notes, []
        return notes

    def line(self) -> dict[str, Any]:
        """What metrics.jsonl gets: `stragglers`, by rank, where there were any."""
        return {"stragglers": {str(r): n for r, n in self.counts.items()}} if self.counts else {}

    def _judge(self, sums: list[float], step: int) -> None:
        taken = self._phases.of_steps() - self._taken
        median = statistics.median_low(sums) if sums else 0.0
        for rank, own in enumerate(sums):
            if own <= SLOW * median or own <= taken / 2:
                continue
            if rank not in self.counts:
                heartbeat = self._parallel.heartbeat
                name = heartbeat.name_of(rank) if heartbeat is not None else f"rank {rank}"
                self._notes.append(
                    f"{name} is slow, and the others wait for it: in the steps {self._first} to "
                    f"{step} it worked {1000 * own / STEPS:.1f} ms a step, the median of the "
                    f"processes {1000 * median / STEPS:.1f} ms"
                )
            self.counts[rank] = self.counts.get(rank, 0) + 1
