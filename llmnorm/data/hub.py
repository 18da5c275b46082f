"""Hugging Face datasets: of a local directory, or of the hub, copied once into files.

What would surprise: `datasets` is imported only where it is needed. It raises whatever its file
systems and its hub client raise, so the two functions that call it turn any exception into a line.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from llmnorm.data.files import MissingInput, looked_in, write_file
from llmnorm.data.records import Record
from llmnorm.data.settings import SourceSettings
from llmnorm.part import InputError, nearest

STREAM_PART = 20_000  # records in a file of a streamed dataset; at most these are lost by a kill


def is_local(source: SourceSettings) -> bool:
    """Whether the source is on this machine: files, or a directory with a dataset."""
    return source.dataset is None or Path(source.dataset).is_dir()


def dataset_records(
    source: SourceSettings, key: str, skip: int = 0, **options: Any
) -> Iterator[Record]:
    """The records of a dataset after the first `skip`.

    Raises:
        InputError: the dataset or one of its records cannot be read.
    """
    records = iter(_load(source, key, **options).skip(skip))
    for number in itertools.count(skip):
        where = f"{key}: record {number} of {source.dataset}"
        try:
            record = next(records, None)
        except Exception as error:
            raise InputError(f"{where}: {_first_line(error)}") from error
        if record is None:
            return
        yield Record(where, record)


def _load(source: SourceSettings, key: str, **options: Any) -> Any:
    """A source's dataset, streamed unless `datasets.save_to_disk` wrote it."""
    import datasets

    assert source.dataset is not None
    saved = [Path(source.dataset, name) for name in ("state.json", "dataset_dict.json")]
    try:
        if any(path.is_file() for path in saved):
            found = datasets.load_from_disk(source.dataset)
            if not isinstance(found, datasets.DatasetDict):
                return found
            if source.split not in found:
                hint = nearest(source.split, list(found))
                raise InputError(f"{key}: {source.dataset} has no split '{source.split}'; {hint}")
            return found[source.split]
        return datasets.load_dataset(
            source.dataset, source.subset, split=source.split, streaming=True, **options
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{key}: cannot load {source.dataset} ({_first_line(error)})") from error


def commit(source: SourceSettings, key: str) -> str:
    """The current commit of a dataset on the hub.

    Raises:
        InputError: there is no such dataset, or no network.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(source.dataset)).sha)
    except Exception as error:
        raise MissingInput(
            f"{key}.dataset: '{source.dataset}' is no local directory"
            f"{looked_in(Path(str(source.dataset)))}, and the hub did not show it "
            f"({_first_line(error)})"
        ) from error


def stream(
    source: SourceSettings,
    key: str,
    spool: Path,
    revision: str,
    copied: Callable[[Record], dict[str, Any]],
) -> None:
    """Copy a dataset of the hub into `spool` as `.jsonl.zst` files.

    Files that an interrupted call wrote are kept, and the records after them are streamed. Every
    record is written, so that it keeps its number.

    Args:
        source: the source.
        key: its configuration key, for messages.
        spool: directory for the files; made if it is not there.
        revision: the commit that is read.
        copied: what is written of a record, as values of JSON; raises for a bad one that is not to
            be left out.
    """
    spool.mkdir(parents=True, exist_ok=True)
    first = len(streamed(spool))
    complete = spool / "complete"  # says how many files there are
    if complete.is_file() and complete.read_bytes() == f"{first}".encode():
        return
    skip = first * STREAM_PART
    records = dataset_records(source, f"{key}.dataset", skip, revision=revision)
    for part in itertools.count(first):
        block = [copied(record) for record in itertools.islice(records, STREAM_PART)]
        if not block:
            break
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in block)
        pack = zstandard.ZstdCompressor(level=3, write_checksum=True)
        write_file(spool / f"{part:06d}.jsonl.zst", pack.compress(lines.encode()))
        if len(block) < STREAM_PART:
            break
    write_file(complete, f"{len(streamed(spool))}".encode())


def streamed(spool: Path) -> list[Path]:
    """The files that `stream` wrote, up to the first that is missing."""
    names = (spool / f"{part:06d}.jsonl.zst" for part in itertools.count())
    return list(itertools.takewhile(Path.is_file, names))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
