"""Reading a source: files and Hugging Face datasets as a sequence of records, or of texts.

A .txt file is a document; so is a record of a .jsonl, .parquet or .arrow file or of a dataset. .txt
and .jsonl may end in .gz or .zst. Files are read in the order of their paths and records in the
order of their file, so a corpus gives the same sequence of texts in every format.

What would surprise:
- Texts are not normalised, neither Unicode nor newlines. A byte order mark is dropped, and a
  document without text is left out.
- A dataset of the hub is streamed once, into `.jsonl.zst` files, since preparing data reads a
  source several times.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from llmnorm.data.files import files, kind
from llmnorm.data.hub import dataset_records, streamed
from llmnorm.data.records import (
    Bad,
    BadRecords,
    Record,
    json_records,
    table_records,
    text_of,
    text_record,
)
from llmnorm.data.settings import SourceSettings
from llmnorm.part import InputError


def bad_records(source: SourceSettings, key: str) -> BadRecords:
    """What `on_bad_record` does with the source's records that cannot be read."""
    return BadRecords(key, skip=source.on_bad_record == "skip")


def texts(
    source: SourceSettings, key: str, spool: Path | None = None, bad: Bad | None = None
) -> Iterator[str]:
    """The source's documents in their order, those without text left out.

    Args:
        source: where to read.
        key: the configuration key of the source, for messages.
        spool: the directory into which `hub.stream` copied a dataset of the hub.
        bad: is told of records that cannot be read; left out, as the source's settings say.

    Raises:
        InputError: a file is missing, damaged or of another kind, or a record cannot be read and
            is not to be left out.
    """
    bad = bad or bad_records(source, key)
    # What is streamed from the hub has its text copied under this name.
    field = "text" if spool is not None else source.text_field
    for record in records(source, [field], key, spool, bad):
        text = text_of(record, field, bad)
        if text:
            yield text


def records(
    source: SourceSettings,
    fields: Collection[str],
    key: str,
    spool: Path | None = None,
    bad: Bad | None = None,
) -> Iterator[Record]:
    """The source's records in their order.

    Args:
        source: where to read.
        fields: which of a record's fields are wanted; a .txt file has the first of them.
        key, spool, bad: as in `texts`.

    Raises:
        InputError: as `texts`.
    """
    bad = bad or bad_records(source, key)
    if source.path is not None:
        return read_files(files(source.path, f"{key}.path"), fields, f"{key}.path", bad)
    if spool is not None:
        return read_files(streamed(spool), fields, f"{key}.dataset", bad)
    return dataset_records(source, f"{key}.dataset")


def validation_texts(source: SourceSettings, key: str, bad: Bad) -> list[str] | None:
    """The texts of the source's own validation files; None where it has none.

    Args:
        source: where to read.
        key: the configuration key of the source, for messages.
        bad: is told of records that cannot be read.

    Raises:
        InputError: as `texts`; or there is no text.
    """
    if source.validation is None:
        return None
    key, field = f"{key}.validation", source.text_field
    read = read_files(files(source.validation, key), [field], key, bad)
    found = [text for record in read if (text := text_of(record, field, bad))]
    if not found:
        raise InputError(f"{key}: {source.validation} has no text")
    return found


def read_files(paths: list[Path], fields: Collection[str], key: str, bad: Bad) -> Iterator[Record]:
    """The records of files, one after the other.

    Args:
        paths: the files.
        fields: which of a record's fields are wanted; a .txt file has the first of them.
        key: the configuration key that names the files, for messages.
        bad: is told of records that cannot be read.

    Raises:
        InputError: a file is missing, damaged, or of another kind.
    """
    for path in paths:
        suffix = kind(path, key)
        if suffix == ".txt":
            yield from text_record(path, next(iter(fields)), key, bad)
        elif suffix == ".jsonl":
            yield from json_records(path, fields, key, bad)
        else:
            yield from table_records(path, suffix, fields, key, bad)
