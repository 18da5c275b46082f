"""`llmnorm compare`: find out whether a part is better, by paired runs."""

import argparse
import shlex
from pathlib import Path

from llmnorm.commands.arguments import count, local

HELP = "find out whether a part is better here, by tuned and paired runs"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, the arms, how they are compared, and how the runs are made."""
    parser.add_argument("config", type=local, metavar="CONFIG", help="what the arms start from")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "key=value"),
        help="an arm and what it changes; the first is the baseline, or CONFIG where it is alone",
    )
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="paired seeds (3)")
    help = "learning rates tried for each arm (5)"
    parser.add_argument("--lr-points", type=count, default=5, metavar="N", help=help)
    parser.add_argument(
        "--horizons",
        choices=["baseline", "arms", "none"],
        default="baseline",
        metavar="baseline|arms|none",
        help="which arms also run at other lengths, to turn gaps in loss into tokens (baseline)",
    )
    help = "compare with this arm too"
    parser.add_argument("--baseline", action="append", default=[], metavar="ARM", help=help)
    help = "an arm whose learning rate is not tuned"
    parser.add_argument("--untuned", action="append", default=[], metavar="ARM", help=help)
    parser.add_argument("--parallel", type=count, default=1, metavar="N", help="runs at a time (1)")
    help = "runs that share a GPU (1)"
    parser.add_argument("--runs-per-gpu", type=count, default=1, metavar="N", help=help)
    help = "default: comparisons/<CONFIG's name>"
    parser.add_argument("--out", type=local, metavar="DIR", help=help)
    help = "print the runs and how long they take; make none"
    parser.add_argument("--plan", action="store_true", help=help)
    help = "keep the checkpoints of finished runs"
    parser.add_argument("--keep-checkpoints", action="store_true", help=help)


def run(parsed: argparse.Namespace, overrides: list[str]) -> int:
    """Make the runs that are missing, then write the report."""
    from llmnorm.analysis.compare.arms import read_arms, read_protocol
    from llmnorm.analysis.compare.command import compare
    from llmnorm.config.shipped import stem

    arms = read_arms(parsed.config, overrides, parsed.arm)
    protocol = read_protocol(
        arms,
        baselines=parsed.baseline,
        untuned=parsed.untuned,
        seeds=parsed.seeds,
        lr_points=parsed.lr_points,
        horizons=parsed.horizons,
    )
    return compare(
        protocol,
        parsed.out or Path("comparisons") / stem(parsed.config),
        command=shlex.join(["llmnorm", *parsed.words]),
        parallel=parsed.parallel,
        per_gpu=parsed.runs_per_gpu,
        plan=parsed.plan,
        keep_checkpoints=parsed.keep_checkpoints,
    )
