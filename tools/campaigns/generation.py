"""Every method of generation with every draft on every mixer, against passes without a cache.

    python tools/campaigns/generation.py [--trials N] [--out FILE]

A trial is a model, a method and a draft with 500 uneven prompts in batches of 1 to 16 rows
(tests/generation/equality.py). It passes if every row has the tokens of plain decoding and the
logits of full passes, in float64, within 1e-12 (models with a recurrent state: 1e-10). The first
trials are the same with 16 prompts, as a look at each; the last in float32, where a row may tie:
the two tokens' logits are closer than twice the rounding error of that step, in at most 1 % of the
rows. The ledger's figures and `--only N` tell how many.
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Result, Trial, campaign

SHORT, LONG = 16, 500
# The names of tests/generation/equality.py and tests/models/cache_rounds.py, which take seconds to
# import that a campaign that is over can save; a test compares them.
MODELS = (
    "softmax",
    "window",
    "linear",
    "nala",
    "ssd",
    "gla",
    "gated_delta",
    "softmax before nala",
    "gated_delta, ssd, window",
)
METHODS = ("ragged", "eqspec", "exspec")
DRAFTS = ("near model", "sometimes right", "always right", "never right", "lookup", "other model")
COMBINATIONS = [
    *[(model, method, draft) for draft in DRAFTS for model in MODELS for method in METHODS],
    *[(model, "plain", "none") for model in MODELS],
]


def make(number: int, chance: random.Random, folder: Path) -> Trial:
    """The combinations in turn, first with few prompts, at last in float32."""
    turn, place = divmod(number, len(COMBINATIONS))
    model, method, draft = COMBINATIONS[place]
    prompts = LONG if turn else SHORT
    precision = "float32" if turn == 2 else "float64"
    figures: dict[str, int] = {}

    def count(result: Result) -> list[str]:
        found = re.search(r"(\d+) of (\d+) rows equal, (\d+) ties", result.out)
        if found:
            figures.update(zip(("equal", "rows", "ties"), map(int, found.groups()), strict=True))
        return [] if found else ["no count of rows"]

    return Trial(
        f"{prompts} prompts{' in float32' * (turn == 2)}: {model}, {method}, {draft}",
        [model, method, draft, str(prompts), str(chance.randrange(10**9)), precision],
        folder,
        names=[],
        codes=(0,),
        check=count,
        times=40,
        script="tests.generation.equality",
        figures=figures,
    )


if __name__ == "__main__":
    sys.exit(campaign("generation", make, default=3 * len(COMBINATIONS), about=str(__doc__)))
