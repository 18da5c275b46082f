"""Prepared data on disk: found by what they are made of, or made by one process under a lock.

    <data.dir>/packed/<identity>/MANIFEST.json   sizes and checksums; written last
    <data.dir>/packed/<identity>/tokenizer/      the tokenizer
    <data.dir>/packed/<identity>/<source>/       the source's shards (shards.py)
    <data.dir>/packed/found/<quick key>          an identity, by the input files' paths, sizes and
                                                 times, so that `find` need not read the files

Where `data.dir` is an address, <data.dir> is `data.local` here, and shared.py copies what is made
to the store, or fetches what another machine has made.

What the sources become is the business of a kind of `Preparation`: rows of packed text (packing.py)
or conversations (conversations.py).
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmnorm.data import default_corpus, files
from llmnorm.data.files import MissingInput
from llmnorm.data.identity import agrees, hash_of, made_of, quick_key
from llmnorm.data.making import say
from llmnorm.data.manifest import NAME, Manifest
from llmnorm.data.packed import file_record
from llmnorm.data.settings import (
    FORMAT,
    FORMATS,
    TOKENIZER_FILES,
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    TrainedOn,
)
from llmnorm.data.shared import SharedData, write_known
from llmnorm.machine.reading import read_bytes
from llmnorm.part import InputError

Opened = TypeVar("Opened")

_IDENTITY = re.compile(r"[0-9a-f]{16}")


class Preparation(ABC, Generic[Opened]):
    """How the data of these settings are prepared and opened.

    Args:
        data, tokenizer: the settings.

    Attributes:
        rules: what decides the data beside the settings, in their identity; empty for packed text.
    """

    rules: Mapping[str, Any] = {}

    def __init__(self, data: DataSettings, tokenizer: TokenizerSettings) -> None:
        self.data, self.tokenizer = data, tokenizer
        self._shared = None if isinstance(data.dir, Path) else SharedData(data.dir)

    @abstractmethod
    def make(self, directory: Path, sources: list[SourceSettings], made: dict[str, Any]) -> None:
        """Fill the directory; every step keeps what an interrupted call finished of it.

        Args:
            directory: of the prepared data.
            sources: the sources' settings.
            made: what the data are made of (identity.py).
        """

    @abstractmethod
    def manifest(self, directory: Path) -> Manifest:
        """The manifest of the directory."""

    @abstractmethod
    def open(self, directory: Path, sources: list[SourceSettings], *, contents: bool) -> Opened:
        """The prepared data in a directory; with `contents` all checksums are compared now."""

    @abstractmethod
    def table(self, opened: Opened, rows: int) -> str:
        """A line a source: its size, and its part of a run of so many rows."""

    @abstractmethod
    def show(self, opened: Opened, count: int, *, seed: int) -> None:
        """Print the first rows of a run with this seed as the model sees them."""

    def find(self, formats: Sequence[int] = FORMATS) -> Opened | None:
        """The prepared data, or None if there is none.

        The input files are looked at (path, size, time), not read.

        Args:
            formats: the first of these in which there is data is taken.

        Raises:
            InputError: a source's files are missing, or the prepared files are damaged.
        """
        sources = sources_of(self.data)
        for format in formats if sources else ():
            identity = self._known(self._quick_key(sources, format))
            if identity and (directory := self._finished(identity)):
                return self.open(directory, sources, contents=False)
        return None

    def ready(self, *, alone: bool, command: str, trained_on: TrainedOn | None = None) -> Opened:
        """The prepared data; a single process prepares it if it is missing.

        Args:
            alone: whether this is the only process.
            command: the command that prepares the data, for the message.
            trained_on: what a run that goes on was trained on; no other data is returned or
                prepared, but for a branch. If it is prepared, the corpus may be gone.

        Raises:
            InputError: as `find` and `prepare`; or the data is missing and there are several
                processes; or the settings now give other data than `trained_on`, or those of a
                branch would train a tokenizer of their own.
        """
        format = FORMAT
        if trained_on and alone and (trained_on.branch or not self._finished(trained_on.identity)):
            self._fetch()
        try:
            if trained_on is None:
                found = self.find((FORMAT,))
            else:
                format = self._format_of(trained_on)
                found = self.find((format,))
        except MissingInput as error:
            found = self._kept(trained_on) if trained_on else None
            if not (found and trained_on):
                raise
            if os.environ.get("RANK", "0") == "0":  # the launcher's number of this process
                say(f"{error}; going on with the prepared data {trained_on.identity} of this run")
        if found is not None:
            return found
        if not alone:
            raise InputError(f"data: not prepared yet; run once, by itself: {command}")
        return self.prepare(format)

    def prepare(self, format: int = FORMAT) -> Opened:
        """Prepare the data, or verify the checksums of what is there already.

        What an interrupted call finished is kept, and the next call continues after it. Two
        processes may prepare the same data; the second waits for the first.

        Args:
            format: by whose rules; an older one for a run that began with it.

        Raises:
            InputError: a source, the tokenizer or the output directory cannot be used.
        """
        packed = self.data.directory / "packed"
        created = [p for p in (packed / "found", packed, *packed.parents) if not p.exists()]
        try:
            self._fetch()
            sources = sources_of(self.data)
            # Taken before the files are read, so that a file which changes meanwhile gets another
            # key.
            quick = self._quick_key(sources, format)
            made = self._made_of(sources, format)
            identity = hash_of(made)
            directory = packed / identity
            directory.mkdir(parents=True, exist_ok=True)
            (packed / "found").mkdir(exist_ok=True)
            with _lock(packed / f"{identity}.lock") as lock:
                there = os.path.lexists(directory / NAME)
                if not there and not (self._shared and self._shared.fetch(directory)):
                    try:
                        self.make(directory, sources, made)
                    except InputError:
                        _remove_if_unusable(directory, lock)
                        raise
            files.write_file(packed / "found" / quick, identity.encode())
            if self._shared:
                self._shared.send(directory, quick)
            return self.open(directory, sources, contents=True)
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

    def _quick_key(self, sources: list[SourceSettings], format: int) -> str:
        return quick_key(self.data, self.tokenizer, sources, format, self.rules)

    def _made_of(self, sources: list[SourceSettings], format: int) -> dict[str, Any]:
        return made_of(self.data, self.tokenizer, sources, format, self.rules)

    def _known(self, quick: str) -> str | None:
        """The identity that was written down for a quick key; None where none is, or damaged."""
        known = self.data.directory / "packed" / "found" / quick
        if not known.is_file() and self._shared and (there := self._shared.known(quick)):
            write_known(known, there)
        if not known.is_file():
            return None
        written = read_bytes(known).decode(errors="replace")
        return written if _IDENTITY.fullmatch(written) else None

    def _finished(self, identity: str) -> Path | None:
        """The directory of prepared data; None where it is not prepared to the end."""
        directory = self.data.directory / "packed" / identity
        if not _IDENTITY.fullmatch(identity):
            return None
        if not os.path.lexists(directory / NAME) and self._shared:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with _lock(directory.with_name(f"{identity}.lock")):
                if not os.path.lexists(directory / NAME):
                    self._shared.fetch(directory)
        return directory if os.path.lexists(directory / NAME) else None

    def _format_of(self, trained_on: TrainedOn) -> int:
        """The format in which the settings give the data `trained_on`.

        The input files are read, once, if they are not those that were prepared, by size and time.
        Where the settings of a branch give other data, that is the newest format.

        Raises:
            InputError: there is no such format; or a branch reads other data and names no
                tokenizer, so that it would not have its parent's.
        """
        sources = sources_of(self.data)
        if not sources:
            raise MissingInput(f"data.sources: default: {self.data.directory / 'default'} is gone")
        quick = {format: self._quick_key(sources, format) for format in FORMATS}
        for format, key in quick.items():
            if self._known(key) == trained_on.identity:
                return format
        made = self._made_of(sources, FORMAT) | self._tokenizer_copied_from(trained_on.identity)
        for format, key in quick.items():
            if hash_of(made | {"format": format}) == trained_on.identity:
                if self._finished(trained_on.identity):
                    found = self.data.directory / "packed" / "found" / key
                    files.write_file(found, trained_on.identity.encode())
                return format
        if trained_on.branch and self.tokenizer.path is None:
            fields = TokenizerSettings.model_fields
            given = [f" tokenizer.{k}={fields[k].default}" for k in self.tokenizer.of_training()]
            default = f"{''.join(given)} (the default, since none is trained)" if given else ""
            raise InputError(
                f"tokenizer: this run branches from {trained_on.where} onto other data, and would "
                "train a tokenizer of its own; keep its parent's: "
                f"tokenizer.path={trained_on.where.parent.parent / 'tokenizer'}{default}"
            )
        if trained_on.branch:
            return FORMAT
        raise InputError(
            f"{trained_on.where}: was trained on the data {trained_on.identity}, this run's data "
            f"is now {hash_of(made)} ({self.data.directory}); restore the corpus or "
            f"{trained_on.otherwise}"
        )

    def _tokenizer_copied_from(self, identity: str) -> dict[str, Any]:
        """How the identity of prepared data describes the tokenizer that it has a copy of.

        A run whose base is gone names its own copy of the tokenizer. Where the chat template needed
        more tokens, the copy is another file than the base's, whose content is in the identity.

        Returns:
            Nothing where the settings do not name this copy.
        """
        named, directory = self.tokenizer.directory, self._finished(identity)
        if named is None or directory is None:
            return {}
        manifest = self.manifest(directory)
        files = {name: file_record(named / name) for name in TOKENIZER_FILES}
        there = {name: record for name, record in files.items() if record[0] >= 0}
        if not manifest.new_tokens or there != manifest.tokenizer:
            return {}
        return {"tokenizer": manifest.made_of["tokenizer"]}

    def _kept(self, trained_on: TrainedOn) -> Opened | None:
        """The prepared data of a run, whose corpus is gone; None where it is gone or of others."""
        directory = self._finished(trained_on.identity)
        if directory is None:
            return None
        manifest = self.manifest(directory)
        names = [source.name for source in manifest.sources]
        sources = sources_of(self.data) or _default_sources(self.data, names)
        if not agrees(manifest.made_of, self.data, self.tokenizer, sources, self.rules):
            return None
        return self.open(directory, sources, contents=False)

    def _fetch(self) -> None:
        if self.data.sources == "default":
            default_corpus.fetch(self.data.directory / "default")


def sources_of(data: DataSettings) -> list[SourceSettings]:
    """The configured sources; an empty list where the default corpus was not fetched yet."""
    if data.sources != "default":
        assert isinstance(data.sources, list)
        return data.weighted(data.sources)
    return _default_sources(data, default_corpus.source_names(data.directory / "default"))


def _default_sources(data: DataSettings, names: list[str]) -> list[SourceSettings]:
    directory = data.directory / "default"
    if not names:
        return []
    return data.weighted(
        [SourceSettings(name=name, path=str(directory / f"{name}.jsonl")) for name in names]
    )


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
