"""Learning-rate schedules as pure functions of the step; nothing of them is in a checkpoint.

A schedule is made for a run of `steps` steps and maps a step s (from 0) to the factor on the peak
learning rate. Warm-up gives (s + 1) / warmup, never 0; the last step has exactly the final factor
(the decay divides by steps - 1 - warmup). Steps past the end keep the final factor.
"""

import math
from collections.abc import Callable

Multiplier = Callable[[int], float]


def constant(steps: int, warmup: int) -> Multiplier:
    """Warm-up, then 1."""
    return _warmed_up(warmup, lambda s: 1.0)


def cosine(steps: int, warmup: int, final: float) -> Multiplier:
    """Warm-up, then final + (1 - final) (1 + cos(pi u)) / 2 with u from 0 to 1."""
    return _warmed_up(
        warmup,
        lambda s: final + (1 - final) * (1 + math.cos(math.pi * _share(s, warmup, steps))) / 2,
    )


def linear(steps: int, warmup: int, final: float) -> Multiplier:
    """Warm-up, then 1 - (1 - final) u with u from 0 to 1."""
    return _warmed_up(warmup, lambda s: 1 - (1 - final) * _share(s, warmup, steps))


def wsd(steps: int, warmup: int, decay: float, shape: str, final: float) -> Multiplier:
    """Warm-up, 1, and over the last `decay * steps` steps down to `final`."""
    # The last stable step is where u = 0, so the decay itself has round(decay * steps) steps.
    start = max(warmup, steps - 1 - round(decay * steps))

    def after(s: int) -> float:
        u = _share(s, start, steps)
        return (
            1 - (1 - final) * u if shape == "linear" else final + (1 - final) * (1 - math.sqrt(u))
        )

    return _warmed_up(warmup, after)


def _warmed_up(warmup: int, after: Multiplier) -> Multiplier:
    return lambda s: (s + 1) / warmup if s < warmup else after(s)


def _share(s: int, start: int, steps: int) -> float:
    """How far s is on the way from `start` (0) to the last step (1)."""
    return min(max(s - start, 0) / max(steps - 1 - start, 1), 1.0)
