"""`llmnorm data`: prepare the corpus, the tokenizer and the packed rows; print some of them."""

import argparse

from llmnorm.commands.arguments import add_config, count
from llmnorm.commands.configured import load_config, resolve_auto
from llmnorm.part import InputError

HELP = "prepare the corpus: tokenizer and packed rows"
TAKES_SETTINGS = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and what to print."""
    add_config(parser)
    help = "print N rows as the model sees them"
    parser.add_argument("--show", type=count, metavar="N", help=help)
    parser.add_argument("--stats", action="store_true", help="documents, tokens, epochs")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Prepare what is missing, then print rows, statistics, or both."""
    config, _ = resolve_auto(load_config(parsed.config, overrides))
    if not config.objective.packs:
        raise InputError(
            "data: a classification reads its files when it starts; nothing is prepared"
        )

    from llmnorm.data import packing, report

    packed = packing.prepare(config.data, config.tokenizer)
    if parsed.show:
        report.show(packed, parsed.show, seed=config.data_seed)
    if parsed.stats or not parsed.show:
        steps = config.training.total_steps(packed.rows, packed.context_length)
        print(report.sources_table(packed, steps * config.training.rows))
