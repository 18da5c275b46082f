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
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmnorm.data.corpus import write_file
from llmnorm.data.tokenizer import Block
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
        return sum(record["documents"] for record in self.records)

    def write(self, blocks: Iterable[Block]) -> list[dict[str, Any]]:
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
        stem = f"{self._name}-{len(self.records):05d}"
        record: dict[str, Any] = {"files": {}}
        for kind, parts in (("tokens", tokens), ("starts", starts)):
            array = np.concatenate(parts)
            buffer = io.BytesIO()
            np.save(buffer, array)
            content = buffer.getbuffer()
            write_file(self._directory / f"{stem}.{kind}.npy", content)
            record["files"][f"{stem}.{kind}.npy"] = [len(content), checksum(content)]
            record["documents" if kind == "starts" else "tokens"] = len(array)
        write_file(self._directory / f"{stem}.json", json.dumps(record).encode())
        self.records.append(record)


def _finished(directory: Path, name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    while (path := directory / f"{name}-{len(records):05d}.json").is_file():
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


class TokenStream:
    """A stream of tokens, read from its shards; a shard is opened when it is first read."""

    def __init__(self, directory: Path, records: list[dict[str, Any]]) -> None:
        self._files = [[directory / name for name in record["files"]] for record in records]
        self._offsets = [0, *accumulate(record["tokens"] for record in records)]
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

    def _shard(self, shard: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if shard not in self._open:
            tokens, starts = (np.load(path, mmap_mode="r") for path in self._files[shard])
            # Plain arrays over the map: a np.memmap costs microseconds for every slice.
            self._open[shard] = np.asarray(tokens), np.asarray(starts)
        return self._open[shard]


def check(directory: Path, records: list[dict[str, Any]], *, contents: bool) -> None:
    """Check that every file of a stream is there and has its size.

    Args:
        directory: of the stream.
        records: of its shards, as `ShardWriter.write` returned them.
        contents: compare checksums too, which reads the files whole.

    Raises:
        InputError: a file is missing or damaged; names the first one.
    """
    for record in records:
        for name, (size, expected) in record["files"].items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                wrong = "is missing"
            elif found != size:
                wrong = f"has {found} bytes, expected {size}"
            elif contents and checksum(np.memmap(path, np.uint8, "r").data) != expected:
                wrong = "does not have its checksum"
            else:
                continue
            raise InputError(
                f"{path}: the shard {wrong}; delete {directory.parent} and prepare the data again"
            )


def checksum(content: Any) -> str:
    """BLAKE2b of bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
