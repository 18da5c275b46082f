"""The server under load: every text equal to the offline engine's, nobody lost, memory flat.

    python tools/campaigns/serving.py [--trials N] [--out FILE]

The first trial has 64 clients with 20 requests each, a fifth of the streams left in their middle;
the second is a soak of 2,000 requests by 8 clients, whose memory in the last quarter is compared
with the second; the others are like the first with other seeds (tests/serving/load.py).
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Trial, campaign

MANY, SOAK = (64, 20), (8, 250)


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """Many clients; the second trial is the soak."""
    clients, requests = SOAK if number == 1 else MANY
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
    sys.exit(campaign("serving", make, default=4, about=str(__doc__)))
