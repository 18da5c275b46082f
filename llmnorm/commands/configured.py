"""The configuration that a command was given, as numbers, with what the user has to know of it."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig


def load_config(path: Path, overrides: list[str]) -> "RunConfig":
    """The settings of a YAML file or run directory; notes on them are printed.

    Raises:
        InputError: a setting is not valid.
    """
    from llmnorm.config.file import load

    loaded = load(path, overrides)
    note(loaded.notes)
    return loaded.config


def resolve_auto(config: "RunConfig") -> tuple["RunConfig", list[str]]:
    """The settings with numbers in the place of `auto`, and how they came about, which is printed.

    Raises:
        InputError: a number cannot be derived from the other settings.
    """
    if not config.automatic():
        return config, []
    from llmnorm.training.automatic import resolve

    resolved = resolve(config)
    note(resolved.notes)
    return resolved


def note(notes: Iterable[str]) -> None:
    """Print notes, on the first of several processes alone."""
    if os.environ.get("RANK", "0") == "0":
        for text in notes:
            print(f"llmnorm: note: {text}", file=sys.stderr)
