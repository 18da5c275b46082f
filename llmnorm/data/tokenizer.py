"""The tokenizer: a byte-level BPE trained on the sources, or a local Hugging Face tokenizer.

A tokenizer directory is Hugging Face's (`AutoTokenizer` reads it), but transformers is not imported
here.

What would surprise:
- The BPE has no normaliser and knows all 256 bytes, so decode(encode(x)) == x for any text
  (tests/test_data/test_packing.py draws texts).
- As a Hugging Face tokenizer it begins every text with `<|bos|>`, as documents in training begin.
- When data is prepared, a text that spells out a special token is encoded as ordinary text.
"""

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmnorm.data.corpus import write_file
from llmnorm.data.settings import MASK_TOKEN, SPECIAL_TOKENS
from llmnorm.part import InputError

# The files of a tokenizer; weights and other files beside them are not copied.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PIECE = 1 << 17  # characters; threads encode the pieces of a longer document in parallel
BLOCK = 1 << 18  # characters that one thread encodes at a time
# Documents are cut where a word ends. A byte-level pre-tokeniser does not join a letter or digit to
# the space after it, so the tokens of the pieces are the tokens of the whole.
WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a stream of documents.

    Attributes:
        tokens: (tokens,) uint16 or uint32, with `bos` and `eos` around every document.
        starts: (documents that begin here,) int64, the offsets of their `bos`.
        ends: (documents that end here,) int64, the offsets after their `eos`.
    """

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


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
        dtype: in which tokens are stored, uint16 or uint32.

    Raises:
        InputError: the directory holds no tokenizer that can be used.
    """

    def __init__(self, directory: Path, key: str = "tokenizer.path") -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            hint = "save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            raise InputError(f"{key}: {directory} holds no tokenizer.json; {hint}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises plain Exception
            reason = " ".join(str(error).split())
            raise InputError(f"{key}: {path} is no tokenizer ({reason})") from error
        self._tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is seven characters
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        special = _special_tokens(directory, key)
        cls, sep, pad, self.mask = (
            ids.get(special.get(name, "")) for name in ("cls", "sep", "pad", "mask")
        )
        bos, eos = ids.get(special.get("bos", ""), cls), ids.get(special.get("eos", ""), sep)
        bos_or_eos = bos if bos is not None else eos
        if bos_or_eos is None:
            raise InputError(f"{key}: {directory} names neither bos_token nor eos_token; set one")
        self.vocab_size = max(ids.values()) + 1
        self.bos = bos_or_eos
        self.eos = bos_or_eos if eos is None else eos
        self.pad = self.eos if pad is None else pad
        added = self._tokenizer.get_added_tokens_decoder()
        named = {self.bos, self.eos, self.pad, cls, sep, self.mask} - {None}
        self.special = named | {number for number, token in added.items() if token.special}
        self.ordinary = sorted(set(ids.values()) - self.special)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, texts: Iterable[str], threads: int) -> Iterator[Block]:
        """Documents -> blocks of tokens in the documents' order, encoded by `threads` threads."""
        # `tokenizers` releases Python's lock while it encodes. Its own thread pool is not used: it
        # waits for the longest text of every batch, and its size cannot be changed later.
        with _own_threads_only(), ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[Block]] = deque()
            for pieces in _blocks(texts):
                waiting.append(pool.submit(self._encode, pieces))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def encode_alone(self, texts: list[str]) -> list[list[int]]:
        """Each text's tokens, without bos and eos."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """The text of tokens; special tokens are spelled out."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _encode(self, pieces: list["_Piece"]) -> Block:
        encodings = self._tokenizer.encode_batch_fast(
            [piece.text for piece in pieces], add_special_tokens=False
        )
        parts: list[list[int]] = []
        starts, ends, size = [], [], 0
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = encoding.ids
            if piece.first:
                starts.append(size)
                ids.insert(0, self.bos)
            if piece.last:
                ids.append(self.eos)
            size += len(ids)
            if piece.last:
                ends.append(size)
            parts.append(ids)
        tokens = np.concatenate([np.array(ids, self.dtype) for ids in parts])
        return Block(tokens, np.array(starts, np.int64), np.array(ends, np.int64))


def train(texts: Iterable[str], vocab_size: int, directory: Path, *, mask: bool = False) -> None:
    """Train a byte-level BPE on `texts` and save it as a Hugging Face tokenizer directory.

    Args:
        texts: what it is trained on.
        vocab_size: its tokens, special ones included.
        directory: where it is saved; made if it is not there.
        mask: add a mask token.
    """
    bos, eos, pad = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, MASK_TOKEN] if mask else list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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


def copy(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files, `tokenizer.json` last: once it is there, all of them are."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in reversed(FILES):
        if (source / name).is_file():
            write_file(directory / name, (source / name).read_bytes())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Piece(NamedTuple):
    """A piece of a document, and whether it is the document's first and its last one."""

    text: str
    first: bool
    last: bool


def _pieces(text: str) -> Iterator[_Piece]:
    start = 0
    while len(text) - start > PIECE and (found := WORD_END.search(text, start + PIECE)):
        yield _Piece(text[start : found.start()], start == 0, False)
        start = found.start()
    yield _Piece(text[start:], start == 0, True)


def _blocks(texts: Iterable[str]) -> Iterator[list[_Piece]]:
    block: list[_Piece] = []
    size = 0
    for text in texts:
        for piece in _pieces(text):
            block.append(piece)
            size += len(piece.text)
            if size >= BLOCK:
                yield block
                block, size = [], 0
    if block:
        yield block


def _special_tokens(directory: Path, key: str) -> dict[str, str]:
    """The directory's special tokens: kind (bos, eos, pad, cls, sep, mask) -> spelling."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{key}: {path} is not valid JSON ({error})") from None
            for kind in ("bos", "eos", "pad", "cls", "sep", "mask"):
                token = config.get(f"{kind}_token")
                token = token.get("content") if isinstance(token, dict) else token
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
