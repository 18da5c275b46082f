"""A stream of tokens on disk, as shards: written whole, and read as memory maps.

Shard k of a stream is three files:

    NAME-k.tokens.npy   (tokens,) uint16 or uint32
    NAME-k.starts.npy   (documents,) int64, the offset of every document's first token in the shard
    NAME-k.json         sizes and checksums of both; written last, so the shard is whole

Shards hold whole documents. An interrupted writer therefore continues with the first document after
the finished shards, and its files equal those of an uninterrupted one byte for byte
(tests/test_data/test_packing.py kills it to check).
"""

import bisect
import hashlib
import io
import json
import os
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmnorm.data.files import write_file
from llmnorm.data.manifest import ShardRecord, cure, file_names
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

    Attributes:
        records: sizes and checksums of the finished shards.
    """

    def __init__(self, directory: Path, name: str, shard_tokens: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name = directory, name
        self._limit = SHARD_TOKENS if shard_tokens is None else shard_tokens
        self.records = _finished(directory, name)

    @property
    def documents(self) -> int:
        """Documents in the finished shards; `write` is given those that follow."""
        return sum(record.documents for record in self.records)

    def write(self, blocks: Iterable[Block]) -> list[ShardRecord]:
        """Write the documents that follow the finished ones.

        Returns:
            The records of all shards.
        """
        tokens: list[NDArray[np.unsignedinteger]] = []  # of the shard that is being filled
        starts: list[NDArray[np.int64]] = []
        size = 0  # tokens in it
        for block in blocks:
            written = 0  # tokens of this block that are in finished shards
            for end in block.ends[size + block.ends >= self._limit].tolist():
                if size + end - written < self._limit:
                    continue  # an earlier end has finished a shard, so this one does not fill it
                inside = (block.starts >= written) & (block.starts < end)
                tokens.append(block.tokens[written:end])
                starts.append(block.starts[inside] - written + size)
                self._finish(tokens, starts)
                tokens, starts, size, written = [], [], 0, end
            tokens.append(block.tokens[written:])
            starts.append(block.starts[block.starts >= written] - written + size)
            size += len(block.tokens) - written
        if size:
            self._finish(tokens, starts)
        return self.records

    def _finish(
        self, tokens: list[NDArray[np.unsignedinteger]], starts: list[NDArray[np.int64]]
    ) -> None:
        number = len(self.records)
        record: dict[str, Any] = {"files": {}}
        arrays: list[NDArray[Any]] = [np.concatenate(tokens), np.concatenate(starts)]
        counts = "tokens", "documents"
        for name, count, array in zip(file_names(self._name, number), counts, arrays, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, array)
            content = buffer.getbuffer()
            write_file(self._directory / name, content)
            record["files"][name] = [len(content), checksum(content)]
            record[count] = len(array)
        path = self._directory / f"{self._name}-{number:05d}.json"
        write_file(path, json.dumps(record).encode())
        self.records.append(ShardRecord.model_validate(record))


def _finished(directory: Path, name: str) -> list[ShardRecord]:
    """The records of an interrupted writer's shards, up to the first that is not whole."""
    records: list[ShardRecord] = []
    while (path := directory / f"{name}-{len(records):05d}.json").is_file():
        try:
            record = read_settings(path, ShardRecord)
            for file in file_names(name, len(records)):
                size, expected = record.files[file]
                if checksum(read_bytes(directory / file, limit=size)) != expected:
                    return records
        except (InputError, KeyError):
            return records
        records.append(record)
    return records


class TokenStream:
    """A stream of tokens, read from its shards.

    A shard is opened, and its checksums are compared, when it is first read: that takes a tenth of
    a second for a shard of 64 MB, once in each process. No file stays open.

    Args:
        directory: of the stream.
        name: of the stream, the beginning of the files' names.
        records: of its shards.
        vocab_size: every token is below it.

    Attributes:
        tokens: their number.

    Raises:
        InputError: a file is missing or of another size. The methods raise it for a shard whose
            content is damaged.
    """

    def __init__(
        self, directory: Path, name: str, records: list[ShardRecord], vocab_size: int
    ) -> None:
        self._directory, self._name, self._records = directory, name, records
        self._vocab_size = vocab_size
        for number in range(len(records)):
            for path, (size, _) in self._files(number):
                self._check_size(path, size)
        self._offsets = [0, *accumulate(record.tokens for record in records)]
        self._open: dict[int, tuple[NDArray[Any], NDArray[np.int64]]] = {}
        self.tokens = self._offsets[-1]

    def read(self, start: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fill `out` with the tokens `start`, ..., `start + len(out) - 1` of the stream.

        Returns:
            The indices into `out` at which documents start.
        """
        document_starts = []
        shard = bisect.bisect_right(self._offsets, start) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self._offsets[shard]
            size = min(len(out) - filled, self._offsets[shard + 1] - start - filled)
            tokens, starts = self._shard(shard)
            out[filled : filled + size] = tokens[offset : offset + size]
            low, high = starts.searchsorted((offset, offset + size))
            document_starts.append(starts[low:high] - (offset - filled))
            filled, shard = filled + size, shard + 1
        if len(document_starts) == 1:
            return document_starts[0]
        return np.concatenate(document_starts)

    def verify(self) -> None:
        """Compare the checksums of all shards that were not read yet.

        Raises:
            InputError: a shard is damaged; names the first one.
        """
        for number in range(len(self._records)):
            self._shard(number)

    def _shard(self, shard: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if shard not in self._open:
            self._open[shard] = self._load(shard)
        return self._open[shard]

    def _load(self, number: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        record = self._records[number]
        arrays: list[NDArray[Any]] = []
        for path, (size, expected) in self._files(number):
            content = self._map(path, size)
            if checksum(content.data) != expected:
                raise self._damaged(path, "does not have its checksum")
            try:
                arrays.append(_array(content))
            except ValueError:
                raise self._damaged(path, "is no array") from None
        tokens, starts = arrays
        if tokens.shape != (record.tokens,) or tokens.dtype.name not in ("uint16", "uint32"):
            raise self._damaged(self._files(number)[0][0], "has not the tokens of its record")
        if int(tokens.max()) >= self._vocab_size:
            what = f"has a token beyond the vocabulary of {self._vocab_size}"
            raise self._damaged(self._files(number)[0][0], what)
        rising = starts.dtype == np.int64 and starts.shape == (record.documents,)
        if (
            not rising
            or starts[0] != 0
            or starts[-1] >= record.tokens
            or (np.diff(starts) < 1).any()
        ):
            raise self._damaged(self._files(number)[1][0], "has not the documents of its record")
        return tokens, starts

    def _files(self, number: int) -> list[tuple[Path, tuple[int, str]]]:
        """Path, size and checksum of a shard's two files."""
        record = self._records[number]
        names = file_names(self._name, number)
        return [(self._directory / name, record.files[name]) for name in names]

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
