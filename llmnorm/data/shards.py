"""A stream of tokens on disk: shards that are written whole, and read as memory maps.

Shard k of a stream is three files: `NAME-k.tokens.npy` (tokens,) uint16 or uint32,
`NAME-k.starts.npy` (documents,) int64 (the place of every document's first token in the shard), and
`NAME-k.json` (their sizes and checksums), which is written last and makes the shard count. Shards
hold whole documents, so an interrupted writer goes on with the first document that no shard holds,
and the files are the same, byte for byte, as without the interruption.
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

SHARD_TOKENS = 1 << 25  # a shard ends with the document that reaches this many: a minute's work


class ShardWriter:
    """Writes a stream of documents; `documents` says how many are safe on disk already."""

    def __init__(self, directory: Path, name: str, shard_tokens: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name = directory, name
        self._limit = SHARD_TOKENS if shard_tokens is None else shard_tokens
        self.records = _finished(directory, name)

    @property
    def documents(self) -> int:
        """Documents in the shards that are finished."""
        return sum(record["documents"] for record in self.records)

    def write(self, blocks: Iterable[Block]) -> list[dict[str, Any]]:
        """Writes the documents after the finished ones; returns the records of all shards."""
        tokens: list[NDArray[np.unsignedinteger]] = []
        starts: list[NDArray[np.int64]] = []
        held = 0  # tokens that wait in the two lists
        for block in blocks:
            done = 0
            for end in block.ends[held + block.ends >= self._limit].tolist():
                if held + end - done < self._limit:
                    continue  # a shard was just written
                inside = (block.starts >= done) & (block.starts < end)
                tokens.append(block.tokens[done:end])
                starts.append(block.starts[inside] - done + held)
                self._finish(tokens, starts)
                tokens, starts, held, done = [], [], 0, end
            tokens.append(block.tokens[done:])
            starts.append(block.starts[block.starts >= done] - done + held)
            held += len(block.tokens) - done
        if held:
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
    """A stream of tokens, read from its shards; nothing is opened before it is read."""

    def __init__(self, directory: Path, records: list[dict[str, Any]]) -> None:
        self._files = [[directory / name for name in record["files"]] for record in records]
        self._offsets = [0, *accumulate(record["tokens"] for record in records)]
        self._open: dict[int, tuple[NDArray[Any], NDArray[np.int64]]] = {}
        self.tokens = self._offsets[-1]

    def read(self, start: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fills `out` with the tokens from `start` on; returns where in it documents start."""
        found = []
        shard = bisect.bisect_right(self._offsets, start) - 1
        filled = 0
        while filled < len(out):
            place = start + filled - self._offsets[shard]
            size = min(len(out) - filled, self._offsets[shard + 1] - start - filled)
            tokens, starts = self._shard(shard)
            out[filled : filled + size] = tokens[place : place + size]
            low, high = starts.searchsorted((place, place + size))
            found.append(starts[low:high] - (place - filled))
            filled, shard = filled + size, shard + 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _shard(self, shard: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if shard not in self._open:
            tokens, starts = (np.load(path, mmap_mode="r") for path in self._files[shard])
            # Plain arrays over the map: a np.memmap costs microseconds for every slice.
            self._open[shard] = np.asarray(tokens), np.asarray(starts)
        return self._open[shard]


def check(directory: Path, records: list[dict[str, Any]], *, contents: bool) -> None:
    """Checks that every file is there and has its size and, with `contents`, its checksum.

    Raises:
        InputError: names the first file that is missing or damaged.
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
    """Checksum of bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
