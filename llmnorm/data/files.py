"""The files that a setting names: found, looked at, opened and written.

    files("books/**/*.txt.gz", key)   the paths that a pattern names, sorted
    opened(path, key)                 a file's bytes, those of .gz and .zst decompressed
    digest(path, key)                 a hash of its content
    write_file(path, content)         written whole or not at all

What would surprise: a file of exactly the name that was given wins over the pattern that the name
would be (`part[12].jsonl`). `**` follows links to directories.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from llmnorm.config.shipped import is_shipped, locate
from llmnorm.data.fetched import fetched
from llmnorm.machine.reading import check_file, is_address, local_path, open_file, reason
from llmnorm.part import InputError, nearest
from llmnorm.remote.objects import StoreError

KINDS = (".txt", ".jsonl", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
# Compressed bytes that are decompressed at once. A block of zeros may become 32,768 times as many.
ZSTD_BLOCK = 1 << 10


class MissingInput(InputError):
    """A file or directory that a setting names is not there."""


def files(pattern: str, key: str) -> list[Path]:
    """The files that a path, a glob, `llmnorm:NAME` or an address names, sorted.

    Args:
        pattern: the path or glob; what an address of a store names is fetched first.
        key: the configuration key of the pattern, for messages.

    Raises:
        InputError: there are none (`MissingInput`); one is no regular file, or of a kind that is
            not read; or links lead in a circle.
    """
    if is_address(pattern):
        try:
            paths = fetched(pattern, key)
        except StoreError as error:
            raise MissingInput(f"{key}: {error}") from None
        if not paths:
            raise MissingInput(f"{key}: nothing in the store matches {pattern}")
        for path in paths:
            kind(path, key)
        return paths
    path = _path(pattern, key)
    if os.path.lexists(path):
        found = [path]
    else:
        if "**" in path.parts:
            _refuse_circles(path, key)
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found and not glob.has_magic(str(path)):
        raise MissingInput(f"{key}: there is no file {pattern}{looked_in(path)}{_hint(path)}")
    paths = [path for path in found if not path.is_dir()]
    if not paths and found:
        raise InputError(f"{key}: {pattern} is a directory; write a glob like {pattern}/*.txt")
    if not paths:
        raise MissingInput(f"{key}: no file matches {pattern}{looked_in(path)}")
    for path in paths:
        kind(path, key)
    return paths


def _path(pattern: str, key: str) -> Path:
    if is_shipped(pattern):
        return locate(pattern, key)
    try:
        return local_path(pattern)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None


def looked_in(path: Path) -> str:
    """The end of a message that a path is not there: where a relative one was looked for."""
    return "" if path.is_absolute() else f" (looked in {Path.cwd()}; paths are relative to it)"


def _hint(path: Path) -> str:
    try:
        siblings = sorted(str(path.parent / p.name) for p in path.parent.iterdir())
    except OSError:
        return ""
    return f"; {nearest(str(path), siblings)}" if 0 < len(siblings) <= 20 else ""


def _refuse_circles(pattern: Path, key: str) -> None:
    """Refuse a directory that holds a link to itself, in which `**` would go round and round."""

    def walk(folder: str, above: frozenset[tuple[int, int]]) -> None:
        with contextlib.suppress(OSError):  # what cannot be listed has no files for glob either
            with os.scandir(folder) as entries:
                inside = [entry.path for entry in entries if entry.is_dir()]
            for path in sorted(inside):
                found = os.stat(path)
                mark = found.st_dev, found.st_ino
                if mark in above:
                    raise InputError(
                        f"{key}: {path} is a link that leads back to a directory above it, so that "
                        f"'**' in {pattern} would find every file again and again; remove the link"
                    )
                walk(path, above | {mark})

    before = pattern.parts[: pattern.parts.index("**")]
    for top in glob.glob(str(Path(*before))):
        with contextlib.suppress(OSError):
            found = os.stat(top)
            walk(top, frozenset({(found.st_dev, found.st_ino)}))


def dataset_files(directory: Path, key: str) -> list[Path]:
    """All files of a dataset in a local directory, sorted.

    Raises:
        InputError: there are none.
    """
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    if not found:
        raise InputError(f"{key}: the directory {directory} is empty")
    return found


def kind(path: Path, key: str) -> str:
    """Which of `KINDS` a file is, by its name.

    Raises:
        InputError: none of them.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    compressed = path.suffix in COMPRESSED
    if last not in KINDS or (compressed and last not in KINDS[:2]):
        raise InputError(
            f"{key}: {path.name} is not of a kind that is read; "
            f"valid: {', '.join(KINDS)}, and {', '.join(COMPRESSED)} after the first two"
        )
    return last


@contextlib.contextmanager
def opened(path: Path, key: str) -> Iterator[IO[bytes]]:
    """Open a file; .gz and .zst are decompressed as they are read, a bounded part at a time.

    Raises:
        InputError: it is no regular file, may not be read, is damaged, or ends too early.
    """
    with open_file(path, key) as raw:
        try:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file  # type: ignore[misc]
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdFile(raw))
            else:
                yield raw
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            text = " ".join(str(error).split())
            raise InputError(f"{key}: {path}: cannot be read ({text})") from None
        except OSError as error:
            raise InputError(f"{key}: {path}: {reason(error)}") from None


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file of any number of frames; EOFError if it ends inside one.

    zstandard's own reader takes a truncated file for a whole one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # --long=31 writes windows larger than the default allows
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = self._file.read(ZSTD_BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._pending = memoryview(self._frame.decompress(block))
            if self._frame.eof:  # the next frame begins in this block
                self._file.seek(-len(self._frame.unused_data), os.SEEK_CUR)
                self._frame = None
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


def digest(path: Path, key: str) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits.

    Raises:
        InputError: it is no regular file, or may not be read.
    """
    with open_file(path, key) as file:
        try:
            found = hashlib.blake2b(digest_size=16)
            while block := file.read(1 << 18):
                found.update(block)
            return found.hexdigest()
        except OSError as error:
            raise InputError(f"{key}: {path}: {reason(error)}") from None


def stamp(path: Path, key: str) -> list[Any]:
    """Path, size and time of a file, by which it is recognised without reading it.

    Raises:
        InputError: it is missing, or no regular file.
    """
    found = check_file(path, key)
    return [str(path.absolute()), found.st_size, found.st_mtime_ns]


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, and safe from a power cut.

    It is written under a temporary name beside `path`, fsynced, then renamed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
