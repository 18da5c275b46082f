"""Preparing data: from the configured sources to packed rows on disk.

A document becomes bos + tokens + eos; the documents of a source, one after the other, are its
stream. Row i is stream[i C : i C + C + 1] with C = `context_length`. Rows of one source overlap by
one token, so every token but the stream's first is a label once (those that start a document are
ignored). Training rows are full; the last validation row is padded, so that every token of the
validation text is counted. tests/test_data/test_packing.py holds both.

    <data.dir>/packed/<identity>/tokenizer/      the tokenizer
    <data.dir>/packed/<identity>/<source>/       the source's shards (shards.py)
    <data.dir>/packed/<identity>/MANIFEST.json   sizes and checksums; written last
    <data.dir>/packed/found/<quick key>          an identity, by the input files' paths, sizes and
                                                 times, so that `find` need not read the files

Context length, weights and seed are not part of the identity: they only say how the same tokens are
read.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmnorm.data import default_corpus, files
from llmnorm.data.files import MissingInput
from llmnorm.data.identity import agrees, hash_of, made_of, quick_key
from llmnorm.data.making import make, say
from llmnorm.data.manifest import NAME, read_manifest
from llmnorm.data.packed import PackedData, PackedSource, open_packed
from llmnorm.data.settings import (
    FORMAT,
    FORMATS,
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    TrainedOn,
)
from llmnorm.machine.reading import read_bytes
from llmnorm.part import InputError

__all__ = ["PackedData", "PackedSource", "TrainedOn", "find", "prepare", "ready"]

_IDENTITY = re.compile(r"[0-9a-f]{16}")


def find(
    data: DataSettings, tokenizer: TokenizerSettings, formats: Sequence[int] = FORMATS
) -> PackedData | None:
    """The prepared data of these settings, or None if there is none.

    The input files are looked at (path, size, time), not read.

    Args:
        data, tokenizer: the settings.
        formats: the first of these in which there is data is taken.

    Raises:
        InputError: a source's files are missing, or the prepared files are damaged.
    """
    sources = sources_of(data)
    for format in formats if sources else ():
        identity = _known(data, quick_key(data, tokenizer, sources, format))
        if identity and (directory := _finished(data, identity)):
            return open_packed(directory, data.context_length, sources, contents=False)
    return None


def ready(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    *,
    alone: bool,
    command: str,
    trained_on: TrainedOn | None = None,
) -> PackedData:
    """The prepared data of these settings; a single process prepares it if it is missing.

    Args:
        data, tokenizer: the settings.
        alone: whether this is the only process.
        command: the command that prepares the data, for the message.
        trained_on: what a run that goes on was trained on; no other data is returned or prepared.
            If it is prepared, the corpus may be gone.

    Raises:
        InputError: as `find` and `prepare`; or the data is missing and there are several processes;
            or the settings now give other data than `trained_on`.
    """
    format = FORMAT
    if trained_on and alone and not _finished(data, trained_on.identity):
        _fetch(data)
    try:
        if trained_on is None:
            packed = find(data, tokenizer, (FORMAT,))
        else:
            format = _format_of(data, tokenizer, trained_on)
            packed = find(data, tokenizer, (format,))
    except MissingInput as error:
        packed = trained_on and _kept(data, tokenizer, trained_on)
        if not (packed and trained_on):
            raise
        if os.environ.get("RANK", "0") == "0":  # the launcher's number of this process
            say(f"{error}; going on with the prepared data {trained_on.identity} of this run")
    if packed is not None:
        return packed
    if not alone:
        raise InputError(f"data: not prepared yet; run once, by itself: {command}")
    return prepare(data, tokenizer, format)


def _known(data: DataSettings, quick: str) -> str | None:
    """The identity that was written down for a quick key; None where there is none, or damaged."""
    known = data.dir / "packed" / "found" / quick
    if not known.is_file():
        return None
    written = read_bytes(known).decode(errors="replace")
    return written if _IDENTITY.fullmatch(written) else None


def _finished(data: DataSettings, identity: str) -> Path | None:
    """The directory of prepared data; None where it is not prepared to the end."""
    directory = data.dir / "packed" / identity
    there = _IDENTITY.fullmatch(identity) and os.path.lexists(directory / NAME)
    return directory if there else None


def _format_of(data: DataSettings, tokenizer: TokenizerSettings, trained_on: TrainedOn) -> int:
    """The format in which the settings give the data `trained_on`.

    The input files are read, once, if they are not those that were prepared, by size and time.

    Raises:
        InputError: there is no such format.
    """
    sources = sources_of(data)
    if not sources:
        raise MissingInput(f"data.sources: default: {data.dir / 'default'} is gone")
    quick = {format: quick_key(data, tokenizer, sources, format) for format in FORMATS}
    for format, key in quick.items():
        if _known(data, key) == trained_on.identity:
            return format
    made = made_of(data, tokenizer, sources)
    for format, key in quick.items():
        if hash_of(made | {"format": format}) == trained_on.identity:
            if _finished(data, trained_on.identity):
                files.write_file(data.dir / "packed" / "found" / key, trained_on.identity.encode())
            return format
    raise InputError(
        f"{trained_on.where}: was trained on the data {trained_on.identity}, this run's data is "
        f"now {hash_of(made)} ({data.dir}); restore the corpus or {trained_on.otherwise}"
    )


def _kept(
    data: DataSettings, tokenizer: TokenizerSettings, trained_on: TrainedOn
) -> PackedData | None:
    """The prepared data of a run, whose corpus is gone; None where it is gone or of others."""
    directory = _finished(data, trained_on.identity)
    if directory is None:
        return None
    manifest = read_manifest(directory)
    sources = sources_of(data) or _default_sources(data, [s.name for s in manifest.sources])
    if not agrees(manifest.made_of, data, tokenizer, sources):
        return None
    return open_packed(directory, data.context_length, sources, contents=False)


def prepare(data: DataSettings, tokenizer: TokenizerSettings, format: int = FORMAT) -> PackedData:
    """Prepare the data of these settings, or verify the checksums of what is there already.

    What an interrupted call finished is kept, and the next call continues after it. Two processes
    may prepare the same data; the second waits for the first.

    Args:
        data, tokenizer: the settings.
        format: by whose rules; an older one for a run that began with it.

    Raises:
        InputError: a source, the tokenizer or the output directory cannot be used.
    """
    packed = data.dir / "packed"
    created = [path for path in (packed / "found", packed, *packed.parents) if not path.exists()]
    try:
        _fetch(data)
        sources = sources_of(data)
        # Taken before the files are read, so that a file which changes meanwhile gets another key.
        quick = quick_key(data, tokenizer, sources, format)
        made = made_of(data, tokenizer, sources, format)
        identity = hash_of(made)
        directory = packed / identity
        directory.mkdir(parents=True, exist_ok=True)
        (packed / "found").mkdir(exist_ok=True)
        with _lock(packed / f"{identity}.lock") as lock:
            if not os.path.lexists(directory / NAME):
                try:
                    make(directory, data, tokenizer, sources, made)
                except InputError:
                    _remove_if_unusable(directory, lock)
                    raise
        files.write_file(packed / "found" / quick, identity.encode())
        return open_packed(directory, data.context_length, sources, contents=True)
    except (InputError, OSError) as error:
        for path in created:
            with contextlib.suppress(OSError):  # it is not empty, or it was not made
                path.rmdir()
        if isinstance(error, InputError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "set another data.dir"
        if full:
            cure = "finished shards are kept, so make room and run it again"
        raise InputError(
            f"data.dir: {error.filename or packed}: {error.strerror or error}; {cure}"
        ) from error


def sources_of(data: DataSettings) -> list[SourceSettings]:
    """The configured sources; an empty list where the default corpus was not fetched yet."""
    if data.sources != "default":
        assert isinstance(data.sources, list)
        return data.sources
    return _default_sources(data, default_corpus.source_names(data.dir / "default"))


def _default_sources(data: DataSettings, names: list[str]) -> list[SourceSettings]:
    directory = data.dir / "default"
    return [SourceSettings(name=name, path=str(directory / f"{name}.jsonl")) for name in names]


def _fetch(data: DataSettings) -> None:
    if data.sources == "default":
        default_corpus.fetch(data.dir / "default")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[Path]:
    """Hold a lock file; the system frees the lock of a process that is killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process prepares the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def _remove_if_unusable(directory: Path, lock: Path) -> None:
    """Remove the directory of a refused preparation, unless it has shards or streamed parts.

    Mistakes in texts or tokenizer are noticed before the first shard. Curing them changes the
    identity, so no later call would use this directory.
    """
    if not any(path.suffix in (".npy", ".zst") for path in directory.rglob("*")):
        shutil.rmtree(directory)
        lock.unlink()
