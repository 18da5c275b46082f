"""Long documents in pieces: how they are cut, and how the pieces' tokens are joined.

Neighbouring pieces of a document overlap. The text that both share is encoded by itself too, so a
piece, the shared text and the next piece are three encodings of the same characters, and they are
joined at a token around which all three agree.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 17  # characters; threads encode the pieces of a longer document in parallel
BLOCK = 1 << 18  # characters that one thread encodes at a time
MARGIN = 1 << 10  # characters; pieces overlap by twice as many
AGREE = 8  # tokens on both sides of a join, which both pieces have
# In data of format 1 pieces do not overlap and begin where a word ends. That is right if no token
# joins a letter or digit to the space after it.
WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a stream of documents.

    Attributes:
        tokens: (tokens,) uint16 or uint32, with `bos` and `eos` around every document.
        starts: (documents that begin here,) int64, the offsets of their `bos`.
        ends: (documents that end here,) int64, the offsets after their `eos`; of conversations the
            offsets after a record's last example, between which no shard ends.
        trained: (tokens,) bool, which tokens are trained; None for text, of which all are.
        tallies: (ends, counts) int64, what was counted up to each of the ends; None for text.
    """

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    trained: NDArray[np.bool_] | None = None
    tallies: NDArray[np.int64] | None = None


class Piece(NamedTuple):
    """A piece of a document.

    Attributes:
        text: its characters.
        shared: those of them with which the piece before it ends; "" where there are none.
        first, last: whether it is the document's first piece, and its last.
    """

    text: str
    shared: str
    first: bool
    last: bool


class Encoded(NamedTuple):
    """A piece's tokens, and those of its shared text encoded by itself."""

    piece: Piece
    ids: NDArray[np.unsignedinteger]
    shared: NDArray[np.unsignedinteger]


def as_block(pieces: list[Encoded]) -> Block:
    """The tokens of finished pieces, which follow each other."""
    sizes = np.array([len(encoded.ids) for encoded in pieces], np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    first = [encoded.piece.first for encoded in pieces]
    last = [encoded.piece.last for encoded in pieces]
    return Block(np.concatenate([encoded.ids for encoded in pieces]), starts[first], ends[last])


def cut_both(before: Encoded, after: Encoded) -> tuple[Encoded, Encoded] | None:
    """`before` without its tokens after the join, and `after` without those before it.

    The shared text ends where `before` ends and begins where `after` begins, so the same tokens
    stand at the end of the one and at the beginning of the other, and a place in the middle of them
    is a place in both. For a BPE this is exact: a sequence of tokens is the encoding of its text if
    each two neighbours are (github.com/github/rust-gems, crates/bpe).

    Returns:
        None where the pieces do not have the same tokens around the join.
    """
    left = len(after.shared) // 2
    right = len(after.shared) - left
    begins, ends = after.shared[: left + AGREE], after.shared[-(right + AGREE) :]
    agree = np.array_equal(after.ids[: left + AGREE], begins) and np.array_equal(
        before.ids[-(right + AGREE) :], ends
    )
    if left < AGREE or not agree:
        return None
    return before._replace(ids=before.ids[:-right]), after._replace(ids=after.ids[left:])


def _pieces(text: str, format: int) -> Iterator[Piece]:
    start = end = 0  # where the next piece begins, and how far it is shared with the one before
    while len(text) - end > PIECE + (0 if format == 1 else 2 * MARGIN):
        if format == 1:
            found = WORD_END.search(text, end + PIECE)
            if not found:
                break
            begins = ends = found.start()
        else:
            begins, ends = end + PIECE - MARGIN, end + PIECE + MARGIN
        yield Piece(text[start:ends], text[start:end], start == 0, False)
        start, end = begins, ends
    yield Piece(text[start:], text[start:end], start == 0, True)


def blocks(texts: Iterable[str], format: int) -> Iterator[list[Piece]]:
    """Documents as lists of pieces of about `BLOCK` characters, cut by the rules of a format."""
    block: list[Piece] = []
    size = 0
    for text in texts:
        for piece in _pieces(text, format):
            block.append(piece)
            size += len(piece.text)
            if size >= BLOCK:
                yield block
                block, size = [], 0
    if block:
        yield block
