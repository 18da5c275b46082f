"""`llmnorm runs`: a table of runs, their state, and the settings in which they differ."""

import argparse
from pathlib import Path

from llmnorm.commands.arguments import local

HELP = "list runs, their state, and the settings in which they differ"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """DIR."""
    parser.add_argument(
        "directory",
        type=local,
        nargs="?",
        default=Path("runs"),
        metavar="DIR",
        help="where the runs are (default: runs)",
    )


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Print the table."""
    from llmnorm.analysis.runs import describe_runs

    print(describe_runs(parsed.directory))
