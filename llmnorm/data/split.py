"""Which text of a source is held out for validation, and which trains the tokenizer.

Documents are held out in the order of their texts' hashes until they make 2 % of the source's
bytes, but at least 32 kB (or a tenth of a source that has less than 320 kB) and at most
`data.validation_bytes`. Of a source with fewer than 20 documents the end of each document is held
out instead. What one source holds out, no other source trains on (`withheld`).

What would surprise: the choice depends on the texts alone, so every file format gives the same
validation text, and equal documents go to the same side.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmnorm.data.settings import FORMAT
from llmnorm.part import InputError

SHARE = 0.02
AT_LEAST = 32_768  # bytes, where a source has ten times as many
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


def held_out(
    documents: Documents, limit: int, name: str, *, format: int = FORMAT, whole: bool = False
) -> NDArray[np.int64]:
    """How many bytes at the end of each document are validation text: 0, some or all.

    Args:
        documents: the source's documents.
        limit: at most this many bytes are held out in all (`data.validation_bytes`).
        name: what messages call the source.
        format: whose rules hold (identity.py).
        whole: never cut a document: a conversation has no end to hold out.

    Returns:
        (documents,) int64.

    Raises:
        InputError: the source has no text, nothing would be left to train on, all documents are
            equal, or none is small enough for `limit`.
    """
    sizes, total = documents.sizes, documents.bytes
    if not total:
        raise InputError(f"{name}: the source has no text")
    few = len(sizes) < FEW and not whole
    # Of few documents each is cut: 3 bytes more are held out than its share (rounded up), since a
    # cut inside a character moves up to 3 bytes forward.
    at_least = AT_LEAST if format == 1 else min(AT_LEAST, total // 10)
    target = min(max(int(SHARE * total), at_least), limit - 4 * len(sizes) * few)
    if target >= total or total < 10:
        raise InputError(
            f"{name}: {total} bytes of text are too few to hold some out for validation; give more "
            "text, or a validation file"
        )
    held_bytes = np.zeros_like(sizes)
    smallest = 0
    if few:
        held_bytes[:] = np.minimum(sizes, -(-target * sizes // total) + 3)
    else:
        order = np.argsort(documents.hashes, kind="stable")
        hashes = documents.hashes[order]
        starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
        if len(starts) == 1:
            raise InputError(
                f"{name}: all {len(sizes)} documents are equal, so none can be held out of the "
                "training text; give documents that differ, or a validation file"
            )
        groups = np.add.reduceat(sizes[order], starts)  # equal documents go together
        smallest, taken = int(groups.min()), 0
        # A text of which there are so many copies is left to the training text.
        most = limit if format == 1 else min(limit, max(target, total // 2))
        for start, size, stop in zip(starts, groups, [*starts[1:], len(order)], strict=True):
            if taken >= target:
                break
            if taken + size <= most:
                held_bytes[order[start:stop]] = sizes[order[start:stop]]
                taken += int(size)
    if target < 1 or not 0 < held_bytes.sum() < total:
        of_size = f" (the smallest has {smallest} bytes, its copies included)" if smallest else ""
        raise InputError(
            f"{name}: no document{of_size} is small enough to be held out within "
            f"data.validation_bytes {limit}; raise it, or give the source a validation file"
        )
    return held_bytes


def withheld(
    sources: list[Documents],
    held_bytes: list[NDArray[np.int64]],
    own: list[Documents | None],
    names: list[str],
) -> list[NDArray[np.int64]]:
    """How many bytes at the end of each document are not trained on.

    That is what its source holds out of it, or more where an equal document is validation text of
    another source, of which it may be a part.

    Args:
        sources: the sources' documents.
        held_bytes: what `held_out` returned for each source.
        own: each source's own validation documents; None where it has none.
        names: what messages call the sources.

    Returns:
        For each source (documents,) int64, nowhere less than `held_bytes`.

    Raises:
        InputError: nothing of a source would be left to train on.
    """
    held = [(d.hashes[h > 0], h[h > 0]) for d, h in zip(sources, held_bytes, strict=True)]
    held += [(found.hashes, found.sizes) for found in own if found is not None]
    hashes, sizes = (np.concatenate(arrays) for arrays in zip(*held, strict=True))
    order = np.lexsort((sizes, hashes))
    hashes, sizes = hashes[order], sizes[order]
    largest = np.append(hashes[1:] != hashes[:-1], True)  # the last of the entries with this hash
    hashes, sizes = hashes[largest], sizes[largest]
    found = []
    for documents, name in zip(sources, names, strict=True):
        place = np.minimum(np.searchsorted(hashes, documents.hashes), len(hashes) - 1)
        kept_back = np.where(hashes[place] == documents.hashes, sizes[place], 0)
        if kept_back.sum() >= documents.bytes:
            raise InputError(
                f"{name}: every document of it is validation text too, of this or another source, "
                "so nothing is left to train on; give text that differs"
            )
        found.append(kept_back)
    return found


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
        held_bytes: what `withheld` returned for each source.
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
