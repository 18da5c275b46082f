"""The law of two drawn tokens for every processor and combination, by every way of drawing.

    python tools/campaigns/sampling.py --trials 153 [--out FILE]

A trial draws an answer's first two tokens 20,000 times (tests/generation/laws.py) for one of 15
combinations of processors, with noise of a seed or without one, and one of 5 drafts, and compares
the counts with the exact law: it passes if the chi-square test's p is above 0.001 over the number
of pairs. The first three trials draw 300 times, as a look at it; those beyond 153 begin again
with other tables of logits. `--only N` prints the figures.
"""

import random
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Trial, campaign

LOOKS, FEW, DRAWS = 3, 300, 20_000


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """The combinations in turn, those of one noise and draft after each other."""
    from tests.generation.laws import COMBINATIONS, DRAFTS, NOISES  # seconds, as in cache.py

    ways = list(product(NOISES, DRAFTS, COMBINATIONS))
    noise, draft, combination = ways[(number - LOOKS) % len(ways)]
    draws = FEW if number < LOOKS else DRAWS
    return Trial(
        f"{combination}, noise {noise}, draft {draft}",
        [combination, noise, draft, str(draws), str(chance.randrange(10**6))],
        folder,
        names=[],
        codes=(0,),
        times=20,
        script="tests.generation.laws",
    )


if __name__ == "__main__":
    sys.exit(campaign("sampling", make, default=153, about=str(__doc__)))
