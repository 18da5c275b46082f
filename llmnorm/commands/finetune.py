"""`llmnorm finetune`: train a loaded model further, by the training loop and a tree of defaults.

The defaults are one file of the package, put below the user's as if he had named it first under
`base`. The run's config.yaml holds what comes out, so `llmnorm train RUN` goes on with the same
settings.
"""

import argparse
from pathlib import Path

from llmnorm.commands import train
from llmnorm.commands.configured import load_config
from llmnorm.config import shipped
from llmnorm.part import InputError

HELP = "fine-tune a model, or resume a fine-tuning run"
TAKES_SETTINGS = True
BELOW = Path(shipped.PREFIX + "finetune/defaults.yaml")


def arguments(parser: argparse.ArgumentParser) -> None:
    """As those of `train`; the help ends with the defaults."""
    train.arguments(parser)


def run(parsed: argparse.Namespace, overrides: list[str]) -> int:
    """Train over the defaults, or go on with a run that began from loaded weights.

    Returns:
        As `train`.

    Raises:
        InputError: the configuration names no weights to start from, or the run began from none.
    """
    train.bring_here(parsed, overrides)
    path = parsed.config
    if path.is_dir() and not (path / "config.yaml").is_file():
        raise InputError(
            f"finetune: {path} is no run; to fine-tune its weights name them in a configuration: "
            f"llmnorm finetune CONFIG model.pretrained={path}"
        )
    config = load_config(path, overrides, below=BELOW)
    if config.model.pretrained is None:
        if path.is_dir():
            raise InputError(
                f"finetune: {path} is a run that began from random weights; to fine-tune what it "
                f"has learned: llmnorm finetune CONFIG model.pretrained={path}"
            )
        raise InputError(
            f"finetune: {path}: model.pretrained is missing: the weights to start from, a run or "
            "the directory of a model"
        )
    return train.start(parsed, overrides, config, command="finetune")


def after_help() -> str:
    """The defaults, as YAML."""
    return f"\ndefaults, below CONFIG ({BELOW}):\n\n{shipped.show(str(BELOW))}\n"
