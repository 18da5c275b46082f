"""Preparing text: from the configured sources to packed rows on disk.

A document becomes bos + tokens + eos; the documents of a source, one after the other, are its
stream. Row i is stream[i C : i C + C + 1] with C = `context_length`. Rows of one source overlap by
one token, so every token but the stream's first is a label once (those that start a document are
ignored). Training rows are full; the last validation row is padded, so that every token of the
validation text is counted. tests/test_data/test_packing.py holds both.

Context length, weights and seed are not part of the identity: they only say how the same tokens are
read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmnorm.data.making import make
from llmnorm.data.manifest import TextManifest, read_manifest
from llmnorm.data.packed import PackedData, PackedSource, open_packed
from llmnorm.data.prepared import Preparation, sources_of
from llmnorm.data.settings import (
    FORMAT,
    FORMATS,
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    TrainedOn,
)

__all__ = [
    "PackedData",
    "PackedSource",
    "PackedText",
    "TrainedOn",
    "find",
    "prepare",
    "ready",
    "sources_of",
]


class PackedText(Preparation[PackedData]):
    """How rows of packed text are prepared and opened."""

    def make(self, directory: Path, sources: list[SourceSettings], made: dict[str, Any]) -> None:
        """Fill the directory."""
        make(directory, self.data, self.tokenizer, sources, made)

    def manifest(self, directory: Path) -> TextManifest:
        """The manifest of the directory."""
        return read_manifest(directory, TextManifest)

    def open(self, directory: Path, sources: list[SourceSettings], *, contents: bool) -> PackedData:
        """The prepared text in a directory."""
        return open_packed(directory, self.data.context_length, sources, contents=contents)

    def table(self, opened: PackedData, rows: int) -> str:
        """A line a source."""
        from llmnorm.data.report import sources_table

        return sources_table(opened, rows)

    def show(self, opened: PackedData, count: int, *, seed: int) -> None:
        """Print the run's first rows as the model sees them."""
        from llmnorm.data.report import show

        show(opened, count, seed=seed)


def find(
    data: DataSettings, tokenizer: TokenizerSettings, formats: Sequence[int] = FORMATS
) -> PackedData | None:
    """The prepared text of these settings, or None (`Preparation.find`)."""
    return PackedText(data, tokenizer).find(formats)


def ready(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    *,
    alone: bool,
    command: str,
    trained_on: TrainedOn | None = None,
) -> PackedData:
    """The prepared text of these settings, made if it is missing (`Preparation.ready`)."""
    return PackedText(data, tokenizer).ready(alone=alone, command=command, trained_on=trained_on)


def prepare(data: DataSettings, tokenizer: TokenizerSettings, format: int = FORMAT) -> PackedData:
    """Prepare the text of these settings, or verify what is there (`Preparation.prepare`)."""
    return PackedText(data, tokenizer).prepare(format)
