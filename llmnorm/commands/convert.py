"""`llmnorm convert`: a model directory with the same function and another norm."""

import argparse

from llmnorm.commands.arguments import add_checkpoint, add_model, add_written

HELP = "write a model directory with the same function and another norm"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, DIR, and the norm."""
    add_model(parser)
    add_written(parser)
    add_checkpoint(parser, average=False)
    parser.add_argument(
        "--to",
        required=True,
        choices=["centred", "rms", "crms", "layer", "lns", "unscaled", "identity"],
        help="the norm; depth scaling out of or into the gains; no norm (from unified)",
    )
    parser.add_argument("--untie", action="store_true", help="give a tied head its own matrix")


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Convert."""
    from llmnorm.exchange.convert import convert_directory

    convert_directory(
        parsed.path,
        parsed.directory,
        target=parsed.to,
        untie=parsed.untie,
        checkpoint=parsed.checkpoint,
    )
