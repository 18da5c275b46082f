"""The tokenizer: a byte-level BPE trained on the sources, or a local Hugging Face tokenizer.

A tokenizer directory is Hugging Face's (`AutoTokenizer` reads it), but transformers is not imported
here.

What would surprise:
- The BPE has no normaliser and knows all 256 bytes, so decode(encode(x)) == x for any text
  (tests/test_data/test_packing.py draws texts).
- As a Hugging Face tokenizer it begins every text with `<|bos|>`, as documents in training begin.
- When data is prepared, a text that spells out a special token is encoded as ordinary text.
- A long document is encoded in pieces that overlap, and joined inside the overlaps where both
  pieces have the same tokens, so that its tokens are those of the whole document
  (tests/test_data/test_tokenizer.py compares them for six kinds of tokenizers). Where two pieces
  share no tokens, as in a word of 100,000 letters that becomes one [UNK], the document is cut at
  the border of a token.
- The BPE is trained on words of at most `LONGEST_WORD` characters: its time grows with the square
  of a word's length, and text without spaces (DNA, base64, a page of Thai) is one word.
"""

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmnorm.data.files import write_file
from llmnorm.data.pieces import Block, Encoded, Piece, as_block, blocks, cut_both
from llmnorm.data.settings import FORMAT, MASK_TOKEN, SPECIAL_TOKENS, TOKENIZER_FILES
from llmnorm.machine.reading import read_bytes, read_object, read_text
from llmnorm.part import InputError

LONGEST_WORD = 256  # characters that the BPE is trained on
# Letters and digits, punctuation, or spaces: what the BPE's pre-tokeniser may take for one word.
LONG_WORD = re.compile(
    rf"[^\W_]{{{LONGEST_WORD + 1},}}|(?:[^\w\s]|[_\x1c-\x1f]){{{LONGEST_WORD + 1},}}"
    rf"|\s{{{LONGEST_WORD + 1},}}"
)
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1}}}|\s{{{LONGEST_WORD + 1}}}")  # found 3 times faster
BYTES = 256  # tokens of a BPE that knows every byte
LARGEST_ID = 1 << 24  # of a token; there is no vocabulary of 16 million tokens
SPECIAL_KINDS = ("bos", "eos", "pad", "cls", "sep", "mask", "unk")


class TextEncoder:
    """A tokenizer directory, ready to encode documents.

    Attributes:
        vocab_size: number of token ids.
        bos, eos: ids before and after a document; BERT's [CLS] and [SEP] where a tokenizer has only
            these, and the same id twice where it names only one of the two.
        pad: id that fills up a row.
        mask: id of the mask token, None if there is none.
        special: ids of special tokens, those above included.
        ordinary: all other ids, ascending.
        spellings: of all tokens, each with its id.
        dtype: in which tokens are stored, uint16 or uint32.

    Raises:
        InputError: the directory holds no tokenizer that can be used.
    """

    def __init__(self, directory: Path, key: str = "tokenizer.path") -> None:
        self._where = f"{key}: {directory}"
        path = directory / "tokenizer.json"
        if not path.is_file():
            hint = "save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            raise InputError(f"{key}: {directory} holds no tokenizer.json; {hint}")
        text = read_text(path, key)
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{key}: {path} is no tokenizer ({reason})") from error
        self._tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is seven characters
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        special = special_tokens(directory, key)
        cls, sep, pad, self.mask = (
            ids.get(special.get(name, "")) for name in ("cls", "sep", "pad", "mask")
        )
        bos, eos = ids.get(special.get("bos", ""), cls), ids.get(special.get("eos", ""), sep)
        bos_or_eos = bos if bos is not None else eos
        if bos_or_eos is None:
            raise InputError(f"{key}: {directory} names neither bos_token nor eos_token; set one")
        self.vocab_size = max(ids.values()) + 1
        if self.vocab_size > LARGEST_ID:
            raise InputError(
                f"{key}: {path} has a token with the id {self.vocab_size - 1:,}; ids must be below "
                f"{LARGEST_ID:,}"
            )
        self.bos = bos_or_eos
        self.eos = bos_or_eos if eos is None else eos
        self.pad = self.eos if pad is None else pad
        added = self._tokenizer.get_added_tokens_decoder()
        named = {self.bos, self.eos, self.pad, cls, sep, self.mask} - {None}
        self.spellings = ids
        self.special = named | {number for number, token in added.items() if token.special}
        self.ordinary = sorted(set(ids.values()) - self.special)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(
        self, texts: Iterable[str], threads: int, *, format: int = FORMAT
    ) -> Iterator[Block]:
        """Documents -> blocks of tokens in the documents' order, encoded by `threads` threads.

        Args:
            texts: the documents.
            threads: how many encode at once.
            format: by whose rules long documents are cut (identity.py).

        Raises:
            InputError: the tokenizer refuses a text.
        """
        yield from self._joined(in_order(self._encode, blocks(texts, format), threads))

    def encode_document(self, text: str) -> NDArray[np.unsignedinteger]:
        """The tokens of one document, with bos and eos.

        Raises:
            InputError: the tokenizer refuses the text.
        """
        joined = self._joined(map(self._encode, blocks([text], FORMAT)))
        return np.concatenate([block.tokens for block in joined])

    def encode_alone(self, texts: list[str]) -> list[list[int]]:
        """Each text's tokens, without bos and eos."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # as above; a WordPiece without [UNK] does so for a new word
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self._where}: cannot encode a text ({reason})") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """The text of tokens; special tokens are spelled out."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _encode(self, pieces: list[Piece]) -> list[Encoded]:
        found = self.encode_alone([piece.text for piece in pieces])
        shared = iter(self.encode_alone([piece.shared for piece in pieces if piece.shared]))
        encoded = []
        for piece, ids in zip(pieces, found, strict=True):
            if piece.first:
                ids.insert(0, self.bos)
            if piece.last:
                ids.append(self.eos)
            both = next(shared) if piece.shared else []
            encoded.append(Encoded(piece, np.array(ids, self.dtype), np.array(both, self.dtype)))
        return encoded

    def _joined(self, encoded: Iterable[list[Encoded]]) -> Iterator[Block]:
        """A block of tokens for each list of pieces; a piece that goes on waits for the next."""
        unfinished: Encoded | None = None
        for pieces in encoded:
            finished: list[Encoded] = []
            for piece in pieces:
                if unfinished is not None:
                    before, piece = self._join(unfinished, piece)
                    finished.append(before)
                unfinished = None if piece.piece.last else piece
                if piece.piece.last:
                    finished.append(piece)
            if finished:
                yield as_block(finished)

    def _join(self, before: Encoded, after: Encoded) -> tuple[Encoded, Encoded]:
        """`before` without its tokens after the join, and `after` without those before it."""
        if not after.piece.shared:
            return before, after
        if joined := cut_both(before, after):
            return joined
        # `after` may have begun inside of a token, and stay out of step, as in a long number that
        # is taken three digits at a time. So it begins again where a token of `before` does.
        text, shared = before.piece.text, after.piece.shared
        rest = after.piece.text[len(shared) :]
        starts = [
            start for start, _ in self._tokenizer.encode(text, add_special_tokens=False).offsets
        ]
        place = max((s for s in starts if s <= len(text) - len(shared)), default=0)
        if place == 0:
            return before, self._encode([after.piece._replace(text=rest, shared="")])[0]
        piece = after.piece._replace(text=text[place:] + rest, shared=text[place:])
        after = self._encode([piece])[0]
        if joined := cut_both(before, after):
            return joined
        following = len(starts) - starts.index(place)
        return before._replace(ids=before.ids[: max(0, len(before.ids) - following)]), after


_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def in_order(
    function: Callable[[_Given], _Made], items: Iterable[_Given], threads: int
) -> Iterator[_Made]:
    """What the function makes of each item, computed by threads, in the items' order.

    `tokenizers` releases Python's lock while it encodes. Its own thread pool is not used: it waits
    for the longest text of every batch, and its size cannot be changed later.
    """
    waiting: deque[Future[_Made]] = deque()
    with _own_threads_only(), ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def train(
    texts: Iterable[str],
    vocab_size: int,
    directory: Path,
    *,
    mask: bool = False,
    special: Iterable[str] = (),
    format: int = FORMAT,
) -> "Trained":
    """Train a byte-level BPE on `texts` and save it as a Hugging Face tokenizer directory.

    Args:
        texts: what it is trained on.
        vocab_size: its tokens, special ones included; there are fewer where the text gives no more.
        directory: where it is saved; made if it is not there.
        mask: add a mask token.
        special: more special tokens, e.g. those of a chat template.
        format: by whose rules (identity.py); in format 1 words of any length are trained on.

    Raises:
        InputError: the special tokens and the bytes are more than `vocab_size`.
    """
    bos, eos, pad = SPECIAL_TOKENS
    every = list(dict.fromkeys([*SPECIAL_TOKENS, *([MASK_TOKEN] if mask else []), *special]))
    if vocab_size < BYTES + len(every):
        raise InputError(
            f"tokenizer.vocab_size: {vocab_size} is too small for {BYTES} bytes and the special "
            f"tokens {', '.join(every)}; give at least {BYTES + len(every)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=every,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cut = _LongWords(texts)
    tokenizer.train_from_iterator(texts if format == 1 else cut, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        **({"mask_token": MASK_TOKEN} if mask else {}),
        # Hugging Face's default removes spaces before punctuation when it decodes.
        "clean_up_tokenization_spaces": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    write_file(directory / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    return Trained(tokenizer.get_vocab_size(), cut.count)


class Trained(NamedTuple):
    """How many tokens a trained BPE has, and how many long words were cut before."""

    vocab_size: int
    cut_words: int


class _LongWords:
    """Texts, cut inside of words of more than `LONGEST_WORD` characters, which are counted."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            start = 0
            for word in LONG_WORD.finditer(text) if LONG_RUN.search(text) else ():
                self.count += 1
                for place in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
                    yield text[start:place]
                    start = place
            yield text[start:]


def copy(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files, `tokenizer.json` last: once it is there, all of them are."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in reversed(TOKENIZER_FILES):
        if (source / name).is_file():
            write_file(directory / name, read_bytes(source / name, "tokenizer.path"))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_special_tokens(directory: Path, key: str) -> None:
    """Refuse a directory whose configuration names tokens that its tokenizer.json does not have.

    Hugging Face would add them with ids beyond the vocabulary, for which a model has no rows.

    Raises:
        InputError: there are such tokens, or a file cannot be read.
    """
    there = TextEncoder(directory, key).spellings
    missing = [
        f"{kind}_token '{token}'"
        for kind, token in special_tokens(directory, key).items()
        if token not in there
    ]
    if missing:
        raise InputError(
            f"{key}: {directory}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "in tokenizer.json; take the name out of tokenizer_config.json (and "
            "special_tokens_map.json), or add the token with "
            f"AutoTokenizer.from_pretrained('{directory}').save_pretrained(DIRECTORY)"
        )


def special_tokens(directory: Path, key: str) -> dict[str, str]:
    """The directory's special tokens: kind (bos, eos, ...) -> spelling."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        config = read_object(path, key)
        for kind in SPECIAL_KINDS:
            token = config.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise InputError(f"{key}: {path}: {kind}_token must be a text, got {token!r:.40}")
            if token is not None:
                found[kind] = token
    return found


@contextmanager
def _own_threads_only() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
