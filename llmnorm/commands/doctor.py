"""`llmnorm doctor [PATH]`: what this machine can run, what of a run is whole, how a model runs."""

import argparse

from llmnorm.commands.arguments import local
from llmnorm.part import InputError

HELP = "report what this machine can run, what of a run is whole, or how a model would be trained"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, which is then looked at in the place of the machine."""
    help = (
        "run directory to verify, to the last byte, or directory of a model of transformers, which "
        "is run to see how it would be trained; nothing in it is changed"
    )
    parser.add_argument("path", type=local, nargs="?", metavar="PATH", help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Print the report.

    Raises:
        InputError: something of the run is lost, or the model cannot be trained.
    """
    if parsed.path is None:
        from llmnorm.machine.doctor import report

        print(report())
        return
    from llmnorm.config.pretrained import is_stock

    if is_stock(parsed.path):
        from llmnorm.exchange import foreign_looks

        print(foreign_looks.report(parsed.path))
        return
    from llmnorm.analysis.verify import verify_run

    text, lost = verify_run(parsed.path)
    print(text, flush=True)
    if lost:
        raise InputError(f"{parsed.path}: lost: {', '.join(lost)}")
    print("nothing is lost")
