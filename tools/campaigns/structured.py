"""A thousand JSON answers of twenty schemas, with speculation and without: all valid, all equal.

    python tools/campaigns/structured.py [--trials N] [--out FILE]

A trial asks a server for 50 answers of one schema twice, with drafts and without; the model has
random weights, and the draft is in turn what stands in the text and the model itself. It passes if
jsonschema takes every answer, each has ended by itself, and drafts have changed none of them
(tests/serving/forms.py). The first three trials ask for 4 answers, as a look at it. `--only N`
prints the figures, and what following the grammar costs a token.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Trial, campaign

LOOKS, FEW, MANY = 3, 4, 50
DRAFTS = ("lookup", "itself")


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """The schemas in turn, first with few answers."""
    from tests.serving.schemas import SCHEMAS

    name = list(SCHEMAS)[(number - LOOKS) % len(SCHEMAS)]
    answers = FEW if number < LOOKS else MANY
    draft = DRAFTS[number % len(DRAFTS)]
    return Trial(
        f"{answers} answers of {name}, draft {draft}",
        [name, str(answers), draft, str(chance.randrange(10**6))],
        folder,
        names=[],
        codes=(0,),
        times=20,
        script="tests.serving.forms",
    )


if __name__ == "__main__":
    sys.exit(campaign("structured", make, default=LOOKS + 20, about=str(__doc__)))
