"""`llmnorm export`: a model directory for other tools, or a file for llama.cpp."""

import argparse

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, count, place
from llmnorm.part import InputError

HELP = "write a model directory for other tools, or a .gguf file for llama.cpp"
TAKES_SETTINGS = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, the target, which weights, and as which class of model."""
    add_model(parser)
    help = "directory to write, new or empty, or a new file NAME.gguf; or their address (s3://...)"
    parser.add_argument("target", type=place, metavar="DIR|FILE.gguf", help=help)
    add_checkpoint(parser)
    add_import(parser)
    help = "as a Llama, a Qwen3 (QK-norm), or the class that it came from"
    parser.add_argument("--stock", action="store_true", help=help)
    help = "of a run with an adapter: the whole model, in the dtype of its base"
    parser.add_argument("--merge", action="store_true", help=help)
    help = "export the mean of the last N checkpoints"
    parser.add_argument("--average", type=count, default=1, metavar="N", help=help)
    help = "of a .gguf file: what its matrices are stored in (f16)"
    parser.add_argument("--type", choices=("f32", "f16", "bf16", "q8_0"), help=help)


def run(parsed: argparse.Namespace, _: list[str]) -> None:
    """Export."""
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe

    as_file = str(parsed.target).endswith(".gguf")
    if as_file and parsed.stock:
        raise InputError("--stock: a .gguf file is of a stock architecture as it is; leave it out")
    if as_file and parsed.merge:
        raise InputError("--merge: a .gguf file holds the whole model as it is; leave it out")
    if parsed.type and not as_file:
        raise InputError(f"--type: belongs to a .gguf file, and {parsed.target} is a directory")

    import_modules(parsed.imports, "--import")
    describe(parsed.path, "export", classes="auto")

    from llmnorm.exchange.elsewhere import written_up

    which = {"average": parsed.average, "ema": parsed.ema, "checkpoint": parsed.checkpoint}
    with written_up(parsed.target) as target:
        if as_file:
            from llmnorm.exchange.gguf_file import export_gguf

            export_gguf(parsed.path, target, type=parsed.type or "f16", **which)
        else:
            from llmnorm.exchange.export import export

            export(parsed.path, target, stock=parsed.stock, merge=parsed.merge, **which)
