"""Reading a source: files and Hugging Face datasets as a sequence of texts.

A .txt file is a document; so is a record of a .jsonl, .parquet or .arrow file or of a dataset. .txt
and .jsonl may end in .gz or .zst. Files are read in the order of their paths and records in the
order of their file, so a corpus gives the same sequence of texts in every format.

What would surprise:
- Texts are not normalised, neither Unicode nor newlines. A byte order mark is dropped, and a
  document without text is left out.
- A dataset of the hub is streamed once, into `.jsonl.zst` files, since preparing data reads a
  source several times.
"""

from collections.abc import Iterator
from pathlib import Path

from llmnorm.data.files import files, kind
from llmnorm.data.hub import dataset_documents, streamed
from llmnorm.data.records import Bad, BadRecords, json_documents, table_documents, text_document
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
    read: Iterator[str | None]
    if source.path is not None:
        paths = files(source.path, f"{key}.path")
        read = read_files(paths, source.text_field, f"{key}.path", bad)
    elif spool is not None:
        read = read_files(streamed(spool), "text", f"{key}.dataset", bad)
    else:
        read = dataset_documents(source, f"{key}.dataset", bad)
    return (text for text in read if text)


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
    key_of_files = f"{key}.validation"
    paths = files(source.validation, key_of_files)
    found = [text for text in read_files(paths, source.text_field, key_of_files, bad) if text]
    if not found:
        raise InputError(f"{key_of_files}: {source.validation} has no text")
    return found


def read_files(paths: list[Path], field: str, key: str, bad: Bad) -> Iterator[str]:
    """The texts of files, one after the other.

    Args:
        paths: the files.
        field: which field of a record holds its text.
        key: the configuration key that names the files, for messages.
        bad: is told of records that cannot be read.

    Raises:
        InputError: a file is missing, damaged, or of another kind.
    """
    for path in paths:
        suffix = kind(path, key)
        if suffix == ".txt":
            yield from text_document(path, key, bad)
        elif suffix == ".jsonl":
            yield from json_documents(path, field, key, bad)
        else:
            yield from table_documents(path, suffix, field, key, bad)
