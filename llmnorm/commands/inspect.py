"""`llmnorm inspect`: a page with plots of what each block of a model does, or of two models."""

import argparse

from llmnorm.commands.arguments import add_checkpoint, add_import, count, local

HELP = "show what each block of a model does, or of two models"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, OTHER, which weights, which rows, and where the page is written."""
    help = "run directory, or directory of any decoder"
    parser.add_argument("path", type=local, metavar="RUN_OR_DIR", help=help)
    help = "a second model, drawn beside the first"
    parser.add_argument("other", type=local, nargs="?", metavar="OTHER", help=help)
    add_checkpoint(parser)
    add_import(parser)
    parser.add_argument(
        "--rows", type=count, metavar="N", help="validation rows to measure on (128)"
    )
    parser.add_argument(
        "--data", type=local, metavar="CONFIG_OR_RUN", help="measure on the text of this one"
    )
    parser.add_argument("--out", type=local, metavar="DIR", help="where the page is written")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Measure and write the page."""
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe, is_stock, refuse_encoder

    import_modules(parsed.imports, "--import")
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
