"""The race of optimizers at tier T0: AdamW as shipped, AdamW tuned, Muon, NorMuon, Conda, SOAP.

usage: python tools/reproduce/optimizers.py [--parallel 2] [--seeds 3] [--arms muon soap] [--plan]

The model and its length are configs/recipes/optimizers/t0.yaml (0.79 million parameters in hidden
matrices, 4 million tokens). The learning rate of every rule but the shipped AdamW is tuned, and
every other arm is compared with both AdamWs. Each finished run is a line of
docs/results/optimizers_t0/runs.jsonl, which is committed; such a run is not made again, on any
machine. Run directories are in runs/reproduce.

Conventions of the arms:
    lr       centre of its grid: for AdamW the Step Law's rate, for the others this rate times the
             factor by which their published rates differ from AdamW's (Muon and NorMuon 1.3, in
             AdamW's unit; Conda with scale 0.25 2.5; SOAP 0.7)
    decay    lr * weight_decay is that of AdamW, in every arm
    others   embeddings, head, norms and biases are trained by AdamW at its own centre, in every
             arm, so that only the rule of the hidden matrices differs

What would surprise: "shipped" is the AdamW baseline of Conda's own LLaMA scripts (lr 1e-3, beta2
0.999, no decay). By the Step Law its rate is a tenth of the best one here, so a factor against it
says more about the baseline than about the rule. Conda's refresh interval scales with
the run: steps / 50 (its 1B recipe), and as an arm of its own steps / 5 (its 60M recipe).
"""

import sys
from pathlib import Path
from typing import Any

from arms import mean_and_error, parser, reproduce

from llmnorm.analysis.compare.arms import read_arms, read_protocol
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.analysis.compare.report import markdown

BASE = Path("configs/recipes/optimizers/t0.yaml")
RESULTS = Path("docs/results/optimizers_t0")
RUNS = Path("runs/reproduce/optimizers_t0")

STEPS = 977
ADAMW_LR = 1.2e-2
DECAY = 0.1 * ADAMW_LR  # lr * weight_decay


def rule(name: str, lr: float, *settings: str) -> list[str]:
    """An arm's overrides, with the decay and the auxiliary parameters that all arms share."""
    own = [f"optimizer={name}", f"optimizer.lr={lr:g}", f"optimizer.weight_decay={DECAY / lr:g}"]
    return [*own, f"optimizer.auxiliary.lr={ADAMW_LR:g}", *settings]


ARMS = {
    "adamw": rule("adamw", ADAMW_LR, "optimizer.betas=[0.9,0.95]"),
    "adamw_shipped": [
        "optimizer=adamw",
        "optimizer.lr=1e-3",
        "optimizer.betas=[0.9,0.999]",
        "optimizer.weight_decay=0",
    ],
    "muon": rule("muon", 1.6e-2, "optimizer.update_rms=match_adamw"),
    "normuon": rule("normuon", 1.6e-2, "optimizer.preset=paper"),
    "conda": rule("conda", 3e-2, f"optimizer.refresh_every={max(10, STEPS // 50)}"),
    "soap": rule("soap", 8e-3),
    "conda_rare": rule("conda", 3e-2, f"optimizer.refresh_every={STEPS // 5}"),
}
BASELINES = ("adamw", "adamw_shipped")
RACE = ("adamw", "adamw_shipped", "muon", "normuon", "conda", "soap")


def table(found: dict[str, Any]) -> str:
    """The share of tuned AdamW's steps that each rule needs for AdamW's final loss, in Markdown.

    Args:
        found: the tree of result.json.
    """
    tuned, shipped = (found["against"][name] for name in BASELINES)
    rows = []
    for name, arm in found["arms"].items():
        row = [name, f"{arm['lr']:.3g}", mean_and_error(arm["losses"], 4)]
        if name in tuned:
            tokens, seconds = tuned[name]["tokens"], tuned[name]["timing"]["seconds"]
            row += [_share(tokens), _share(seconds), _inverse(tokens["resolvable"])]
        else:
            row += ["1", "1", "-"]
        row.append(_share(shipped[name]["tokens"]) if name in shipped else "1")
        rows.append(row)
    head = ["rule", "lr", "loss", "steps, of tuned AdamW's", "seconds, of tuned AdamW's"]
    head += ["told from 1 if below", "steps, of shipped AdamW's"]
    return markdown(head, rows)


def _share(factor: dict[str, Any]) -> str:
    """One over a factor in length with its 95 % interval, and a star if it is extrapolated."""
    value, least, most = (_inverse(factor[key]) for key in ("value", "high", "low"))
    return f"{value} [{least}, {most}]" + "*" * bool(factor.get("extrapolated"))


def _inverse(factor: float | str | None) -> str:
    """One over a factor, which may be "infinity"; a dash where there is none."""
    return f"{1 / float(factor):.2f}" if factor else "-"


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then the report and the table."""
    words = parser(__doc__, ARMS, RACE)
    words.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all arms")
    options = words.parse_args(arguments)
    chosen = list(dict.fromkeys([*BASELINES, *options.arms]))

    def read() -> Protocol:
        return read_protocol(
            read_arms(BASE, options.set, [[name, *ARMS[name]] for name in chosen]),
            baselines=BASELINES,
            untuned=["adamw_shipped"],
            seeds=options.seeds,
        )

    return reproduce(read, lambda _, found: table(found), RESULTS, RUNS, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
