"""A run of two processes, killed at each named moment, each process being the victim once.

    python tools/campaigns/points.py [--trials 104] [--out FILE]

The moments are those of tools/campaigns/ranks/moments.py, 13 of them. The victims are the process
of rank 0, that of rank 1, both, and the launcher alone: 52 trials under FSDP2, and with
`--trials 104` 52 more under ZeRO-2. Whoever is left must end by itself, with the code of a lost
process. The next life of the run must find a whole checkpoint, and come to the weights, the
optimizer state and the metrics of the run that was not killed, to the bit, with no directory left
over.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.ranks import lives
from tools.campaigns.ranks.launcher import CODES
from tools.campaigns.ranks.moments import BEHIND, POINTS, REACHED, VICTIMS
from tools.campaigns.trials import Trial, campaign

SHARDINGS = ("fsdp2", "zero2")
PAIRS = [(point, victim) for victim in VICTIMS for point in POINTS]


def make(number: int, _: random.Random, folder: Path) -> Trial:
    """Kill at a moment; the trial's own command goes on with the run."""
    point, victim = PAIRS[(17 * number + 4) % len(PAIRS)]  # neighbours differ in both
    sharding = SHARDINGS[number // len(PAIRS) % len(SHARDINGS)]
    reference = lives.whole(sharding)
    more = ["checkpoint.asynchronous=true"] if point in BEHIND else []
    if point == "P12":  # there must be something to resume from
        lives.ended(lives.begin(sharding, folder, kill_at="P9:all"), folder)
    launcher = lives.begin(sharding, folder, *more, kill_at=f"{point}:{victim}")
    code = lives.ended(launcher, folder)
    wrong = [] if (folder / REACHED).exists() else ["the moment was not reached"]
    if code is None:
        wrong.append(f"what was left did not end in {lives.PATIENCE:.0f} s")
    elif victim != "launcher":
        wrong += lives.wrong_codes(json.loads((folder / CODES).read_text()), victim)
    elif (folder / "run" / "DONE").exists():
        wrong.append("the processes went on without their launcher")
    what = f"{sharding}, {point}, victim {victim}"
    return lives.trial(what, sharding, more, folder, wrong, reference)


if __name__ == "__main__":
    sys.exit(campaign("points", make, default=len(PAIRS), about=str(__doc__)))
