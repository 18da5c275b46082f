"""Which text of a source is held out for validation, and which trains the tokenizer.

Documents are held out in the order of their texts' hashes until 2 % of the source's bytes, at least
32 kB and at most `data.validation_bytes`; a source of fewer than 20 documents gives the end of
each.

What would surprise: the choice depends on the texts alone, not on the format or on where a dataset
comes from (a streamed one is written down first, so its length is known), and equal documents go to
the same side.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmnorm.part import InputError

SHARE = 0.02
AT_LEAST = 32_768
FEW = 20


@dataclass(frozen=True)
class Documents:
    """A source's documents in reading order: hashes (documents,) uint64, sizes in bytes int64."""

    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """Size of all texts."""
        return int(self.sizes.sum())


def survey(texts: Iterable[str]) -> Documents:
    """Reads a source once and notes the hash and the size of every document."""
    found = []
    for text in texts:
        raw = text.encode()
        word = hashlib.blake2b(raw, digest_size=8).digest()
        found.append((int.from_bytes(word, "little"), len(raw)))
    hashes = np.array([word for word, _ in found], np.uint64)
    return Documents(hashes, np.array([size for _, size in found], np.int64))


def held_out(documents: Documents, limit: int, key: str) -> NDArray[np.int64]:
    """How many bytes at the end of each document are validation text: 0, some or all, (documents,).

    Raises:
        InputError: nothing is left to train on, or no document fits below `limit`.
    """
    sizes, total = documents.sizes, documents.bytes
    if not total:
        raise InputError(f"{key}: the source has no text")
    few = len(sizes) < FEW
    # A cut inside a document moves up to 3 bytes forward, to where a character begins.
    target = min(max(int(SHARE * total), AT_LEAST), limit - 4 * len(sizes) * few)
    if target >= total:
        raise InputError(
            f"{key}: {total} bytes of text are too few, since {target} are held out for "
            "validation; give more text, or a validation file"
        )
    held = np.zeros_like(sizes)
    if few:
        held[:] = np.minimum(sizes, -(-target * sizes // total) + 3)
    else:
        order = np.argsort(documents.hashes, kind="stable")
        hashes = documents.hashes[order]
        starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
        groups = np.add.reduceat(sizes[order], starts)  # equal documents go together
        taken = 0
        for start, size, stop in zip(starts, groups, [*starts[1:], len(order)], strict=True):
            if taken >= target:
                break
            if taken + size <= limit:
                held[order[start:stop]] = sizes[order[start:stop]]
                taken += int(size)
    if target < 1 or not 0 < held.sum() < total:
        raise InputError(
            f"{key}: data.validation_bytes {limit} does not let a part of the documents be held "
            "out; raise it, or give the source a validation file"
        )
    return held


def cut(text: str, held: int) -> tuple[str, str]:
    """A document's training and validation part, of which the last `held` bytes are made."""
    if not held:
        return text, ""
    raw = text.encode()
    place = len(raw) - held
    while place < len(raw) and raw[place] & 0xC0 == 0x80:  # inside a character
        place += 1
    return raw[:place].decode(), raw[place:].decode()


def sample(
    sources: list[Documents], held: list[NDArray[np.int64]], budget: int
) -> list[NDArray[np.int64]]:
    """How many bytes at the start of each document train the tokenizer, (documents,) a source.

    Every source gives the same number of bytes, those that have fewer give all; within a source the
    documents are taken in the order of their hashes, and no validation text is among them.
    """
    available = [d.sizes - h for d, h in zip(sources, held, strict=True)]
    shares = dict.fromkeys(range(len(sources)), 0)
    waiting = sorted(shares, key=lambda one: int(available[one].sum()))
    for place, one in enumerate(waiting):  # the smallest first: the rest share what it leaves
        shares[one] = min(int(available[one].sum()), budget // (len(waiting) - place))
        budget -= shares[one]
    taken = []
    for one, documents in enumerate(sources):
        order = np.argsort(documents.hashes, kind="stable")
        before = np.cumsum(available[one][order]) - available[one][order]
        part = np.zeros_like(documents.sizes)
        part[order] = np.clip(shares[one] - before, 0, available[one][order])
        taken.append(part)
    return taken


def sampled(texts: Iterable[str], taken: NDArray[np.int64]) -> Iterator[str]:
    """The parts that `sample` chose."""
    for text, size in zip(texts, taken.tolist(), strict=True):
        if size:
            yield text.encode()[:size].decode(errors="ignore")
