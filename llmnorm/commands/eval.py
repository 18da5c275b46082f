"""`llmnorm eval`: loss of a model on validation rows, and its scores on lm-eval's tasks."""

import argparse

from llmnorm.commands.arguments import (
    add_checkpoint,
    add_import,
    add_model,
    count,
    local,
    names,
)

HELP = "evaluate a model on validation rows and lm-eval's tasks"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, which weights, and what they are evaluated on."""
    add_model(parser)
    add_checkpoint(parser)
    add_import(parser)
    parser.add_argument(
        "--tasks", type=names, metavar="A,B", help="lm-eval's tasks, by name or file"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="at most N examples of each task")
    parser.add_argument("--batch-size", type=count, metavar="N", help="rows at once")
    parser.add_argument("--adapter", type=local, metavar="DIR", help="a PEFT adapter on the model")
    parser.add_argument(
        "--data", type=local, metavar="CONFIG_OR_RUN", help="evaluate on the text of this one"
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluate."""
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe

    import_modules(parsed.imports, "--import")
    describe(parsed.path, "eval", classes="auto")

    from llmnorm.evaluation.directory import evaluate_directory

    evaluate_directory(
        parsed.path,
        overrides,
        checkpoint=parsed.checkpoint,
        ema=parsed.ema,
        adapter=parsed.adapter,
        data=parsed.data,
        tasks=parsed.tasks,
        limit=parsed.limit,
        batch_size=parsed.batch_size,
    )
