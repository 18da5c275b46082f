"""`llmnorm plot`: a picture of one or more runs."""

import argparse
from pathlib import Path

HELP = "draw runs: loss, rates, gradient norm"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN ..., and the file to write."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    help = "picture to write (.png, .pdf, .svg)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Draw."""
    from llmnorm.analysis.plots import plot

    plot(parsed.runs, parsed.out)
