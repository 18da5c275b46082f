"""Which text of a source is held out for validation, and which trains the tokenizer.

Documents are held out in the order of their texts' hashes until they make 2 % of the source's
bytes, but at least 32 kB and at most `data.validation_bytes`. Of a source with fewer than 20
documents the end of each document is held out instead.

What would surprise: the choice depends on the texts alone, so every file format gives the same
validation text, and equal documents go to the same side.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmnorm.part import InputError

SHARE = 0.02
AT_LEAST = 32_768  # bytes
FEW = 20  # documents


@dataclass(frozen=True)
class Documents:
    """A source's documents in reading order.

    Attributes:
        hashes: (documents,) uint64, of the texts.
        sizes: (documents,) int64, in UTF-8 bytes.
    """

    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.sizes.sum())


def survey(texts: Iterable[str]) -> Documents:
    """Read a source once for the hash and the size of every document."""
    hashes, sizes = [], []
    for text in texts:
        raw = text.encode()
        word = hashlib.blake2b(raw, digest_size=8).digest()
        hashes.append(int.from_bytes(word, "little"))
        sizes.append(len(raw))
    return Documents(np.array(hashes, np.uint64), np.array(sizes, np.int64))


def held_out(documents: Documents, limit: int, key: str) -> NDArray[np.int64]:
    """How many bytes at the end of each document are validation text: 0, some or all.

    Args:
        documents: the source's documents.
        limit: at most this many bytes are held out in all (`data.validation_bytes`).
        key: what messages call the source.

    Returns:
        (documents,) int64.

    Raises:
        InputError: the source has no text, nothing would be left to train on, or no document is
            small enough for `limit`.
    """
    sizes, total = documents.sizes, documents.bytes
    if not total:
        raise InputError(f"{key}: the source has no text")
    few = len(sizes) < FEW
    # Of few documents each is cut: 3 bytes more are held out than its share (rounded up), since a
    # cut inside a character moves up to 3 bytes forward.
    target = min(max(int(SHARE * total), AT_LEAST), limit - 4 * len(sizes) * few)
    if target >= total:
        raise InputError(
            f"{key}: {total} bytes of text are too few, since {target} are held out for "
            "validation; give more text, or a validation file"
        )
    held_bytes = np.zeros_like(sizes)
    if few:
        held_bytes[:] = np.minimum(sizes, -(-target * sizes // total) + 3)
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
                held_bytes[order[start:stop]] = sizes[order[start:stop]]
                taken += int(size)
    if target < 1 or not 0 < held_bytes.sum() < total:
        raise InputError(
            f"{key}: no document is small enough to be held out within data.validation_bytes "
            f"{limit}; raise it, or give the source a validation file"
        )
    return held_bytes


def cut(text: str, held_bytes: int) -> tuple[str, str]:
    """A document's training part and its validation part, the last `held_bytes` bytes.

    A cut inside a character moves forward to the next one.
    """
    if not held_bytes:
        return text, ""
    raw = text.encode()
    border = len(raw) - held_bytes
    while border < len(raw) and raw[border] & 0xC0 == 0x80:  # inside a character
        border += 1
    return raw[:border].decode(), raw[border:].decode()


def sample(
    sources: list[Documents], held_bytes: list[NDArray[np.int64]], budget: int
) -> list[NDArray[np.int64]]:
    """How many bytes at the start of each document train the tokenizer.

    Every source gives the same number of bytes; a source that has fewer gives all. Within a source,
    documents are taken in the order of their hashes. Validation text is not among them.

    Args:
        sources: the sources' documents.
        held_bytes: what `held_out` returned for each source.
        budget: bytes in all.

    Returns:
        For each source (documents,) int64.
    """
    available = [d.sizes - h for d, h in zip(sources, held_bytes, strict=True)]
    totals = [int(sizes.sum()) for sizes in available]
    shares = [0] * len(sources)
    smallest_first = sorted(range(len(sources)), key=totals.__getitem__)
    for number, source in enumerate(smallest_first):  # the larger ones share what it leaves
        shares[source] = min(totals[source], budget // (len(sources) - number))
        budget -= shares[source]
    taken = []
    for documents, sizes, share in zip(sources, available, shares, strict=True):
        order = np.argsort(documents.hashes, kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]
        part = np.zeros_like(documents.sizes)
        part[order] = np.clip(share - before, 0, sizes[order])
        taken.append(part)
    return taken


def sampled(texts: Iterable[str], taken: NDArray[np.int64]) -> Iterator[str]:
    """The texts' parts that `sample` chose; texts of which it chose nothing are left out."""
    for text, size in zip(texts, taken.tolist(), strict=True):
        if size:
            yield text.encode()[:size].decode(errors="ignore")
