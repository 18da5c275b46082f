"""`llmnorm convert`: another norm in a model that computes the same."""

import argparse

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, add_written

HELP = "change a model's norm without changing what it computes"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, DIR, and the norm."""
    add_model(parser)
    add_written(parser)
    add_checkpoint(parser, average=False)
    add_import(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=["centred", "rms", "crms", "layer", "lns", "unscaled", "identity"],
        help="a norm; lns or unscaled: depth scaling as a factor or in the gains; identity: none",
    )
    parser.add_argument("--untie", action="store_true", help="give a tied head its own matrix")


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Convert."""
    from llmnorm.config.modules import import_modules

    import_modules(parsed.imports, "--import")

    from llmnorm.exchange.convert import convert_directory

    convert_directory(
        parsed.path,
        parsed.directory,
        target=parsed.to,
        untie=parsed.untie,
        checkpoint=parsed.checkpoint,
    )
