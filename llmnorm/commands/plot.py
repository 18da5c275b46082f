"""`llmnorm plot`: a picture of one or more runs."""

import argparse

from llmnorm.commands.arguments import local

HELP = "draw runs: loss, rates, gradient norm"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN ..., and the file to write."""
    parser.add_argument("runs", type=local, nargs="+", metavar="RUN", help="run directory")
    help = "picture to write (.png, .pdf, .svg)"
    parser.add_argument("--out", type=local, metavar="FILE", help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Draw."""
    from llmnorm.analysis.plots import plot

    plot(parsed.runs, parsed.out)
