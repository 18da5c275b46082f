"""The configuration that a command was given, with notes to the user about it."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig


def load_config(path: Path, overrides: list[str], below: Path | None = None) -> "RunConfig":
    """Load the settings of a YAML file or a run directory, and print notes about them.

    Args:
        below: a file that a YAML file is put over, as if it came first under its `base`.

    Raises:
        InputError: a setting is not valid.
    """
    from llmnorm.config.file import load

    loaded = load(path, overrides, below=below)
    note(loaded.notes)
    return loaded.config


def resolve_auto(config: "RunConfig") -> tuple["RunConfig", list[str]]:
    """Put numbers in the place of `auto`, and print how each was found.

    Returns:
        The settings, and these notes (none where nothing was `auto`).

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
    """Print notes to stderr; of several processes, only the first prints."""
    if os.environ.get("RANK", "0") == "0":
        for text in notes:
            print(f"llmnorm: note: {text}", file=sys.stderr)
