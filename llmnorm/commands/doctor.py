"""`llmnorm doctor [RUN]`: what this machine can run, or what of a run is whole."""

import argparse

from llmnorm.commands.arguments import local
from llmnorm.part import InputError

HELP = "report what this machine can run, or what of a run is whole"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, which is then checked in the place of the machine."""
    help = "run directory to verify, to the last byte; nothing in it is changed"
    parser.add_argument("path", type=local, nargs="?", metavar="RUN", help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Print the report.

    Raises:
        InputError: something of the run is lost.
    """
    if parsed.path is None:
        from llmnorm.machine.doctor import report

        print(report())
        return
    from llmnorm.analysis.verify import verify_run

    text, lost = verify_run(parsed.path)
    print(text, flush=True)
    if lost:
        raise InputError(f"{parsed.path}: lost: {', '.join(lost)}")
    print("nothing is lost")
