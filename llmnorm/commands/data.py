"""`llmnorm data`: prepare packed rows, or conversations, and their tokenizer; print some."""

import argparse

from llmnorm.commands.arguments import add_config, count
from llmnorm.commands.configured import load_config, resolve_auto
from llmnorm.part import InputError

HELP = "prepare the data: tokenizer, and packed rows or conversations"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and what to print."""
    add_config(parser)
    help = "print N rows as the model sees them; of conversations, what is trained"
    parser.add_argument("--show", type=count, metavar="N", help=help)
    parser.add_argument("--stats", action="store_true", help="documents, tokens, epochs")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Prepare what is missing, then print rows, statistics, or both."""
    config, _ = resolve_auto(load_config(parsed.config, overrides))
    preparation = config.objective.preparation(config)
    if preparation is None:
        raise InputError(
            "data: a classification reads its files when it starts; nothing is prepared"
        )
    prepared = preparation.prepare()
    if parsed.show:
        preparation.show(prepared, parsed.show, seed=config.data_seed)
    if parsed.stats or not parsed.show:
        steps = config.total_steps(prepared.rows)
        print(preparation.table(prepared, steps * config.pool))
