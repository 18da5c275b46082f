"""`llmnorm export`: a model directory for other tools."""

import argparse

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, add_written, count

HELP = "write a model directory for other tools"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, DIR, which weights, and as which class of model."""
    add_model(parser)
    add_written(parser)
    add_checkpoint(parser)
    add_import(parser)
    help = "as a Llama, a Qwen3 (QK-norm), or the class that it came from"
    parser.add_argument("--stock", action="store_true", help=help)
    help = "of a run with an adapter: the whole model, in the dtype of its base"
    parser.add_argument("--merge", action="store_true", help=help)
    help = "export the mean of the last N checkpoints"
    parser.add_argument("--average", type=count, default=1, metavar="N", help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Export."""
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe

    import_modules(parsed.imports, "--import")
    describe(parsed.path, "export")

    from llmnorm.exchange.export import export

    export(
        parsed.path,
        parsed.directory,
        stock=parsed.stock,
        average=parsed.average,
        ema=parsed.ema,
        checkpoint=parsed.checkpoint,
        merge=parsed.merge,
    )
