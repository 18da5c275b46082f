"""`llmnorm inspect`: what every block of a model does, or of two, as a page with plots."""

import argparse
from pathlib import Path

from llmnorm.commands.arguments import add_checkpoint, count

HELP = "show what every block of a model does, or of two"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, OTHER, which weights, on which rows, and where the page is written."""
    help = "run, or any decoder's directory"
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR", help=help)
    help = "another beside it"
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help=help)
    add_checkpoint(parser)
    parser.add_argument("--rows", type=count, metavar="N", help="validation rows (default: 128)")
    parser.add_argument("--data", type=Path, metavar="CONFIG_OR_RUN", help="whose text is read")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page is written")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Measure and write the page."""
    from llmnorm.config.pretrained import describe, is_stock, refuse_encoder

    paths = [parsed.path] + ([parsed.other] if parsed.other else [])
    for path in paths:
        if not is_stock(path):
            classes = describe(path, "inspect").architectures
            refuse_encoder(classes, f"inspect: {path}", "its figures are of")

    from llmnorm.analysis.depth.command import ROWS, inspect

    inspect(
        paths,
        overrides,
        rows=parsed.rows or ROWS,
        checkpoint=parsed.checkpoint,
        ema=parsed.ema,
        data=parsed.data,
        output=parsed.out,
    )
