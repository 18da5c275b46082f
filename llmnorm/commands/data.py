"""`llmnorm data`: prepare packed rows, or conversations, and their tokenizer; print some."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.commands.arguments import add_config, count
from llmnorm.commands.configured import load_config, resolve_auto
from llmnorm.config.manifest import directory_of, meta_of_run, read_manifest, steps_in
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.data.stages import Start

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

    from llmnorm.data.report import stages_table
    from llmnorm.data.stages import course

    start = _own(parsed.config, prepared.identity)
    if start is None and config.training.branch_from is not None:
        start = _start(config.training.branch_from, own=False)
    of_run = course(config, prepared, start)
    prepared = prepared.in_stages(of_run.stages)
    if parsed.show:
        preparation.show(prepared, parsed.show, seed=config.data_seed)
    if parsed.stats or not parsed.show:
        print(preparation.table(prepared, of_run.rows))
        if stages := stages_table(prepared, of_run):
            print(stages)


def _own(config: Path, identity: str) -> "Start | None":
    """The newest checkpoint of the run that the command names, where that has read these data."""
    if config.is_dir() and (steps := steps_in(config / "checkpoints")):
        with suppress(InputError):  # a damaged one; the table does without
            start = _start(config / "checkpoints" / directory_of(steps[-1]), own=True)
            return start if start.meta["data"] == identity else None
    return None


def _start(path: Path, *, own: bool) -> "Start":
    from llmnorm.data.stages import Start

    return Start(path, meta_of_run(path, read_manifest(path)), own)
