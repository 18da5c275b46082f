"""Long plays of the cache's verbs on every mixer, against passes without a cache.

    python tools/campaigns/cache.py --trials 45 [--out FILE]

A trial plays the state machine of tests/models/cache_rounds.py on one model: the first of each
model 30 rounds, as a look at it, every later one 400. It passes if each pass has the logits of one
without a cache, in float64, within 1e-12 (models with a recurrent state: 1e-10), and if what a
rollback replays and what the cache holds keep their bounds in every round. `--only N` prints the
figures.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Trial, campaign

SHORT, LONG = 30, 400


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """The models in turn, each with a seed of its own."""
    from tests.models.cache_rounds import MODELS  # seconds, which a campaign that is over can save

    name = list(MODELS)[number % len(MODELS)]
    rounds = SHORT if number < len(MODELS) else LONG
    seed = str(chance.randrange(10**9))
    return Trial(
        f"{rounds} rounds on {name}",
        [name, str(rounds), seed],
        folder,
        names=[],
        codes=(0,),
        times=20,
        script="tests.models.cache_rounds",
    )


if __name__ == "__main__":
    sys.exit(campaign("cache", make, default=45, about=str(__doc__)))
