"""A stream of tokens on disk, as shards: written whole, and read as memory maps.

Shard k of a stream is three files, of conversations four:

    NAME-k.tokens.npy   (tokens,) uint16 or uint32
    NAME-k.starts.npy   (documents,) int64, the offset of every document's first token in the shard
    NAME-k.trained.npy  (tokens,) bool, which tokens are trained; of conversations, whose documents
                        are the examples
    NAME-k.json         sizes and checksums of them; written last, so the shard is whole

Shards hold whole documents, and all examples of a record. An interrupted writer therefore continues
with the first document after the finished shards, and its files equal those of an uninterrupted one
byte for byte (tests/test_data/test_packing.py kills it to check).
"""

import bisect
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmnorm.data.files import write_file
from llmnorm.data.manifest import TEXT, ShardRecord, cure, file_names
from llmnorm.data.pieces import Block
from llmnorm.machine.reading import check_file, read_bytes, read_settings
from llmnorm.part import InputError

SHARD_TOKENS = 1 << 25  # a shard ends with the document that reaches this: a minute of tokenising


class ShardWriter:
    """Writes a stream of documents.

    Args:
        directory: made if it is not there; finished shards in it are kept.
        name: of the stream, the beginning of the files' names.
        shard_tokens: tokens at which a shard ends; left out, SHARD_TOKENS.
        arrays: of a shard, `manifest.TEXT` or `manifest.EXAMPLES`.

    Attributes:
        records: sizes and checksums of the finished shards.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        shard_tokens: int | None = None,
        arrays: Sequence[str] = TEXT,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name, self._arrays = directory, name, arrays
        self._limit = SHARD_TOKENS if shard_tokens is None else shard_tokens
        self.records = _finished(directory, name, arrays)

    @property
    def documents(self) -> int:
        """Documents in the finished shards; `write` is given those that follow."""
        return sum(record.documents for record in self.records)

    def write(self, blocks: Iterable[Block]) -> list[ShardRecord]:
        """Write the documents that follow the finished ones.

        Returns:
            The records of all shards.
        """
        parts: list[list[NDArray[Any]]] = [[] for _ in self._arrays]  # of the shard to be filled
        size = 0  # tokens in it
        tally: list[int] = []  # of the last end in it

        def add(block: Block, start: int, end: int) -> None:
            """Add the tokens [start, end) of a block."""
            inside = (block.starts >= start) & (block.starts < end)
            found: list[NDArray[Any]] = [
                block.tokens[start:end],
                block.starts[inside] - start + size,
            ]
            if block.trained is not None:
                found.append(block.trained[start:end])
            for part, array in zip(parts, found, strict=True):
                part.append(array)

        for block in blocks:
            written = 0  # tokens of this block that are in finished shards
            for number in np.flatnonzero(size + block.ends >= self._limit).tolist():
                end = int(block.ends[number])
                if size + end - written < self._limit:
                    continue  # an earlier end has finished a shard, so this one does not fill it
                add(block, written, end)
                if block.tallies is not None:
                    tally = block.tallies[number].tolist()
                self._finish(parts, tally)
                parts, size, written = [[] for _ in self._arrays], 0, end
            add(block, written, len(block.tokens))
            size += len(block.tokens) - written
            if block.tallies is not None and len(block.tallies):
                tally = block.tallies[-1].tolist()
        if size:
            self._finish(parts, tally)
        return self.records

    def _finish(self, parts: list[list[NDArray[Any]]], tally: list[int]) -> None:
        number = len(self.records)
        record: dict[str, Any] = {"files": {}} | ({"tally": tally} if tally else {})
        arrays = [np.concatenate(part) for part in parts]
        for name, array in zip(self._files(number), arrays, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, array)
            content = buffer.getbuffer()
            write_file(self._directory / name, content)
            record["files"][name] = [len(content), checksum(content)]
        record["tokens"], record["documents"] = len(arrays[0]), len(arrays[1])
        path = self._directory / f"{self._name}-{number:05d}.json"
        write_file(path, json.dumps(record).encode())
        self.records.append(ShardRecord.model_validate(record))

    def _files(self, number: int) -> list[str]:
        return file_names(self._name, number, self._arrays)


def _finished(directory: Path, name: str, arrays: Sequence[str]) -> list[ShardRecord]:
    """The records of an interrupted writer's shards, up to the first that is not whole."""
    records: list[ShardRecord] = []
    while (path := directory / f"{name}-{len(records):05d}.json").is_file():
        try:
            record = read_settings(path, ShardRecord)
            for file in file_names(name, len(records), arrays):
                size, expected = record.files[file]
                if checksum(read_bytes(directory / file, limit=size)) != expected:
                    return records
        except (InputError, KeyError):
            return records
        records.append(record)
    return records


class TokenStream:
    """A stream of tokens, read from its shards.

    An array of a shard is opened, and its checksum is compared, when it is first read: that takes a
    tenth of a second for 64 MB, once in each process. No file stays open.

    Args:
        directory: of the stream.
        name: of the stream, the beginning of the files' names.
        records: of its shards.
        vocab_size: every token is below it.
        arrays: of a shard, as they were written.

    Attributes:
        tokens: their number.

    Raises:
        InputError: a file is missing or of another size. The methods raise it for a shard whose
            content is damaged.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        records: list[ShardRecord],
        vocab_size: int,
        arrays: Sequence[str] = TEXT,
    ) -> None:
        self._directory, self._name, self._records = directory, name, records
        self._vocab_size, self._arrays = vocab_size, arrays
        for number in range(len(records)):
            for array in arrays:
                path, (size, _) = self._file(number, array)
                self._check_size(path, size)
        self._offsets = [0, *accumulate(record.tokens for record in records)]
        self._open: dict[tuple[int, str], NDArray[Any]] = {}
        self.tokens = self._offsets[-1]

    def read(self, start: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fill `out` with the tokens `start`, ..., `start + len(out) - 1` of the stream.

        Returns:
            The indices into `out` at which documents start.
        """
        document_starts = []
        for shard, offset, part in self._parts(start, len(out)):
            size = part.stop - part.start
            out[part] = self._array(shard, "tokens")[offset : offset + size]
            starts = self._array(shard, "starts")
            low, high = starts.searchsorted((offset, offset + size))
            document_starts.append(starts[low:high] - (offset - part.start))
        if len(document_starts) == 1:
            return document_starts[0]
        return np.concatenate(document_starts)

    def trained(self, start: int, out: NDArray[np.bool_]) -> None:
        """Fill `out` with which of the tokens `start`, ... are trained; of conversations."""
        for shard, offset, part in self._parts(start, len(out)):
            size = part.stop - part.start
            out[part] = self._array(shard, "trained")[offset : offset + size]

    def starts(self) -> NDArray[np.int64]:
        """Where every document of the stream starts; (documents,)."""
        found = [self._array(n, "starts") + self._offsets[n] for n in range(len(self._records))]
        return np.concatenate([np.empty(0, np.int64), *found])

    def verify(self) -> None:
        """Compare the checksums of all arrays that were not read yet.

        Raises:
            InputError: a shard is damaged; names the first one.
        """
        for number in range(len(self._records)):
            for array in self._arrays:
                self._array(number, array)

    def _parts(self, start: int, count: int) -> Iterator[tuple[int, int, slice]]:
        """The shards that hold `count` tokens from `start` on.

        Yields:
            A shard, the first of its tokens, and which of the `count` these are.
        """
        shard = bisect.bisect_right(self._offsets, start) - 1
        filled = 0
        while filled < count:
            offset = start + filled - self._offsets[shard]
            size = min(count - filled, self._offsets[shard + 1] - start - filled)
            yield shard, offset, slice(filled, filled + size)
            filled, shard = filled + size, shard + 1

    def _array(self, number: int, array: str) -> NDArray[Any]:
        if (number, array) not in self._open:
            self._open[number, array] = self._load(number, array)
        return self._open[number, array]

    def _load(self, number: int, array: str) -> NDArray[Any]:
        record = self._records[number]
        path, (size, expected) = self._file(number, array)
        content = self._map(path, size)
        if checksum(content.data) != expected:
            raise self._damaged(path, "does not have its checksum")
        try:
            found = _array(content)
        except ValueError:
            raise self._damaged(path, "is no array") from None
        if array == "starts":
            rising = found.dtype == np.int64 and found.shape == (record.documents,)
            if (
                not rising
                or found[0] != 0
                or found[-1] >= record.tokens
                or (np.diff(found) < 1).any()
            ):
                raise self._damaged(path, "has not the documents of its record")
            return found
        kinds = ("uint16", "uint32") if array == "tokens" else ("bool",)
        if found.shape != (record.tokens,) or found.dtype.name not in kinds:
            raise self._damaged(path, "has not the tokens of its record")
        if array == "tokens" and int(found.max()) >= self._vocab_size:
            what = f"has a token beyond the vocabulary of {self._vocab_size}"
            raise self._damaged(path, what)
        return found

    def _file(self, number: int, array: str) -> tuple[Path, tuple[int, str]]:
        """Path, size and checksum of an array of a shard."""
        (name,) = file_names(self._name, number, [array])
        return self._directory / name, self._records[number].files[name]

    def _map(self, path: Path, size: int) -> NDArray[np.uint8]:
        """A file's bytes, read as they are needed; numpy's own map would keep the file open."""
        import torch

        self._check_size(path, size)
        try:
            return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: cannot be read ({reason})") from None

    def _check_size(self, path: Path, size: int) -> None:
        if not os.path.lexists(path):
            raise self._damaged(path, "is missing")
        found = check_file(path).st_size
        if found != size:
            raise self._damaged(path, f"has {found} bytes, expected {size}")

    def _damaged(self, path: Path, what: str) -> InputError:
        return InputError(f"{path}: the shard {what}; {cure(self._directory.parent)}")


def _array(content: NDArray[np.uint8]) -> NDArray[Any]:
    """The one-dimensional array in the content of a .npy file.

    Raises:
        ValueError: there is none.
    """
    file = io.BytesIO(content[:4096].tobytes())
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("of another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    array = content[file.tell() :].view(dtype)
    if array.shape != shape:
        raise ValueError("of another shape")
    return array


def checksum(content: Any) -> str:
    """BLAKE2b of bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
