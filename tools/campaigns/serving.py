"""The server under load: every text equal to the offline engine's, nobody lost, memory flat.

    python tools/campaigns/serving.py [--trials N] [--out FILE]

A trial is 64 clients with 20 requests each, a fifth of the streams left in their middle; the fourth
one is a soak of 2,000 requests by 8 clients, whose memory in the last quarter may be 2 % above that
of the second. The first three have a few clients, as a look at it (tests/serving/load.py).
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Trial, campaign

FEW, MANY, SOAK = (3, 2), (64, 20), (8, 250)


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """Few clients, then the soak, then many."""
    clients, requests = FEW if number < 3 else SOAK if number == 3 else MANY
    return Trial(
        f"{clients} clients, {requests} requests each",
        [str(clients), str(requests), str(chance.randrange(10**9))],
        folder,
        names=[],
        codes=(0,),
        times=40,
        script="tests.serving.load",
    )


if __name__ == "__main__":
    sys.exit(campaign("serving", make, default=6, about=str(__doc__)))
