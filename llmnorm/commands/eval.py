"""`llmnorm eval`: figures of a model on validation rows and lm-eval's tasks."""

import argparse
from pathlib import Path

from llmnorm.commands.arguments import add_checkpoint, add_model, count, names

HELP = "evaluate a model on validation rows and lm-eval's tasks"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, which weights, and what they are evaluated on."""
    add_model(parser)
    add_checkpoint(parser)
    parser.add_argument("--tasks", type=names, metavar="A,B", help="lm-eval's tasks: names, paths")
    parser.add_argument("--limit", type=count, metavar="N", help="examples of every task at most")
    parser.add_argument("--batch-size", type=count, metavar="N", help="rows at once")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT adapter on the model")
    parser.add_argument(
        "--data", type=Path, metavar="CONFIG_OR_RUN", help="whose text is evaluated"
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluate."""
    from llmnorm.config.pretrained import describe

    describe(parsed.path, "eval")

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
