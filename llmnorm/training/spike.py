"""A step whose loss or gradient norm leaps out of those before it: its update is left out.

    a value v of a step is a spike if   v > mean + sigma * deviation   of the window

The window holds the values of the last `training.spike.window` steps, each step's own entering
after it was judged. That of a skipped step enters too: if the losses stay high, the mean follows.
A deviation is that of all values of the window (divided by their number).

What would surprise:
- A step with a non-finite value is skipped for that (step.py). It enters nothing, since a mean of
  it would be none.
- The window acts from half full. It is emptied where a stage of the data begins, and a branch
  begins with an empty one: what is usual then is not known yet.
- After `training.max_skipped_steps` skipped spikes without an update between them the next one is
  updated with. A spike never ends a run.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from llmnorm.config.tree import SpikeSettings

if TYPE_CHECKING:
    from llmnorm.training.state import Progress


class Spike(NamedTuple):
    """What leapt out of a step.

    Attributes:
        name: "loss" or "gradient norm".
        value: its value in this step.
        limit: the largest value that would have been usual.
        steps: how many steps the limit is taken from.
    """

    name: str
    value: float
    limit: float
    steps: int


def look(
    progress: "Progress", settings: SpikeSettings, loss: float, grad_norm: float
) -> Spike | None:
    """What leaps out of a step with finite values, which then enter the window of `progress`.

    The numbers are the same on every process, and so is what is returned.
    """
    window, found = progress.window, None
    if 2 * len(window) >= settings.window:
        for place, name, value in ((0, "loss", loss), (1, "gradient norm", grad_norm)):
            limit = _limit([values[place] for values in window], settings.sigma)
            if value > limit and found is None:
                found = Spike(name, value, limit, len(window))
    window.append([loss, grad_norm])
    del window[: -settings.window]
    return found


def _limit(values: list[float], sigma: float) -> float:
    """The mean and `sigma` deviations; `fsum` rounds once, in whatever order the values come."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean + sigma * math.sqrt(variance)
