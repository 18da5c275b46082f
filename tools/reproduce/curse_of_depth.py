"""The curse of depth at small size: placements of the norm beside Pre-LN with scaled init.

usage: python tools/reproduce/curse_of_depth.py [--arms NAME ...] [--parallel 2] [--seeds 3]
       [--lr-points 5] [--plan]

Every file of configs/recipes/curse_of_depth is an arm. Each arm's learning rate is tuned, and all
train on the same tokens with the same paired seeds. The table shows perplexities, with standard
errors, relative to the stronger baseline: Pre-LN whose residual projections start smaller
(1 / sqrt(2 layers)). Beside them are the same ratios of the paper. Each finished run is a line of
docs/results/curse_of_depth/runs.jsonl, which is committed; such a run is not made again, so arms
can be added one by one. Run directories are in runs/reproduce.

Source: Sun et al., "The Curse of Depth in Large Language Models", arXiv 2502.05795: table 1 (130M
and 250M, perplexity on C4), table 6 (scaled init) and table 7 (sandwich norm, 130M).

What would surprise: the paper's gain over this baseline is 1.1 % at 130M and 3.0 % at 250M, not the
3.6 % and 7.2 % over plain Pre-LN. At this size one can expect the same direction at most.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arms import mean_and_error, parser, reproduce

from llmnorm.analysis.compare.arms import read_arms, read_protocol
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.analysis.compare.report import markdown

RECIPES = Path("configs/recipes/curse_of_depth")
RESULTS = Path("docs/results/curse_of_depth")
RUNS = Path("runs/reproduce/curse_of_depth")


class Paper(NamedTuple):
    """An arm's perplexities in the paper; None where the paper has none."""

    title: str
    at_130m: float | None
    at_250m: float | None


ARMS = {
    "pre_ln_scaled": Paper("Pre-LN + scaled init", 26.04, 20.98),
    "pre_ln": Paper("Pre-LN", 26.73, 21.92),
    "post_ln": Paper("Post-LN", 26.95, 1409.79),
    "deepnorm": Paper("DeepNorm", 27.17, 22.77),
    "mix_ln": Paper("Mix-LN", 26.07, 21.39),
    "peri_ln": Paper("Peri-LN (paper: sandwich)", 26.51, None),
    "lns": Paper("LayerNorm Scaling", 25.76, 20.35),
}
BASELINE = "pre_ln_scaled"


def table(found: dict[str, Any]) -> str:
    """The arms' perplexities beside the paper's, in Markdown.

    Args:
        found: the tree of result.json.
    """
    base = np.array(found["arms"][BASELINE]["losses"], dtype=float)
    rows = []
    for name, paper in ARMS.items():
        if name not in found["arms"]:
            continue
        losses = np.array(found["arms"][name]["losses"], dtype=float)
        ratio = math.exp((losses - base).mean())
        relative = f"{ratio:.3f}"
        if len(losses) > 1 and name != BASELINE:
            # To first order: the ratio times the standard error of its logarithm.
            relative += f" ± {ratio * (losses - base).std(ddof=1) / math.sqrt(len(losses)):.3f}"
        of_paper = [
            f"{value / reference:.3f}" if value and reference else "-"
            for value, reference in zip(paper[1:], ARMS[BASELINE][1:], strict=True)
        ]
        rate = f"{found['arms'][name]['lr']:.3g}"
        loss = mean_and_error(found["arms"][name]["losses"], 4)
        perplexity = f"{math.exp(losses.mean()):.2f}"
        rows.append([paper.title, rate, loss, perplexity, relative, *of_paper])
    head = ["arm", "lr", "loss", "perplexity", "over the first's", "paper, 130M", "paper, 250M"]
    return markdown(head, rows)


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then the report and the table."""
    words = parser(__doc__, ARMS, ARMS)
    words.add_argument("--lr-points", type=int, default=5, help="a grid begins with; it grows")
    options = words.parse_args(arguments)
    names = [name for name in ARMS if name in (BASELINE, *options.arms)]

    def read() -> Protocol:
        given = [[name, str(RECIPES / f"{name}.yaml")] for name in names]
        return read_protocol(
            read_arms(RECIPES / f"{BASELINE}.yaml", [], given),
            baselines=[BASELINE],
            seeds=options.seeds,
            lr_points=options.lr_points,
            horizons="none",
        )

    return reproduce(read, lambda _, found: table(found), RESULTS, RUNS, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
