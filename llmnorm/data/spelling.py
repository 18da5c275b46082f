"""A tokenizer that tells the special tokens which a template writes from those in its messages.

    <|im_start|>user\\na<|im_end|>b<|im_end|>     two ends in the text, one in the tokens

The tokenizer is a copy in which every special token has another spelling: BEGIN, its number, END.
`mark` puts marks around the special tokens that a message spells out, before the template renders
it. `respell` then gives those that the template wrote the copy's spelling, and takes the marks
away: what a message spelled out is text to the copy.

What would surprise:
- All four characters are noncharacters of Unicode, which tokenizers leave as they are. A text that
  holds one is refused, so that no message can imitate the copy's spelling.
- The tokens are those of the tokenizer itself where messages spell out none, whatever its kind
  (tests/test_data/test_chat.py compares four).
- It adds no token of its own accord, neither bos nor eos.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer

from llmnorm.machine.reading import read_text
from llmnorm.part import InputError

Span = tuple[int, int]  # the first character and the one behind the last

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around a special token that a message spells out
BEGIN, END = "\ufdd2", "\ufdd3"  # around the number of a special token that the template writes
BORDER = BEGIN + END  # keeps two texts apart, and is no token of the model
SPECIAL = re.compile(f"{BEGIN}(\\d+){END}")
_RESERVED = re.compile(f"[{OPEN}{CLOSE}{BEGIN}{END}]")


class Refused(InputError):
    """Messages that cannot be rendered, or whose answers cannot be found in the rendered text."""


class Tokens(NamedTuple):
    """An encoded text: `ids` (tokens,) int64, and `trained` (tokens,) bool."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


class Speller:
    """The copy of a tokenizer.

    Args:
        path: of its tokenizer.json.
        key: the configuration key for messages.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._tokenizer, self._ids = _copy(path, key)
        self._spelled = {number: text for text, number in self._ids.items()}
        self._border = self._tokenizer.token_to_id(BORDER)
        longest_first = sorted(self._ids, key=len, reverse=True)
        token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._special = re.compile(token)
        # What a message spells out; a token that the template writes; a mark that stands alone,
        # since the template took the text apart. One that writes JSON may escape the marks.
        opened, closed = (f"(?:{mark}|\\\\u{ord(mark):x})" for mark in (OPEN, CLOSE))
        self._found = re.compile(f"{opened}({token}){closed}|({token})|{opened}|{closed}")

    def mark(self, value: Any) -> Any:
        """A value of JSON, with marks around the special tokens that its texts spell out.

        Raises:
            Refused: a text holds one of the characters above.
        """
        if isinstance(value, str):
            if found := _RESERVED.search(value):
                raise Refused(f"the text holds U+{ord(found[0]):X}, which is no character")
            return self._special.sub(lambda token: f"{OPEN}{token[0]}{CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(inner) for inner in value]
        return value

    def respell(self, raw: str, spans: Sequence[Span] = ()) -> tuple[str, list[Span]]:
        """A template's text in the copy's spelling, and where spans of it lie then."""
        places = sorted({place for span in spans for place in span})
        moved: dict[int, int] = {}
        parts, size, last = [], 0, 0
        for found in self._found.finditer(raw):
            while places and places[0] <= found.start():
                place = places.pop(0)
                moved[place] = size + place - last
            spelled, token = found.groups()
            part = raw[last : found.start()]
            part += f"{BEGIN}{self._ids[token]}{END}" if token else spelled or ""
            parts.append(part)
            size, last = size + len(part), found.end()
            while places and places[0] <= last:  # inside of the token, or at its end
                moved[places.pop(0)] = size
        moved |= {place: size + place - last for place in places}
        text = "".join([*parts, raw[last:]])
        return text, [(moved[start], moved[end]) for start, end in spans]

    def plain(self, text: str) -> str:
        """A text in the copy's spelling, as the model's tokenizer spells it."""
        return SPECIAL.sub(lambda found: self._spelled[int(found[1])], text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, special ones spelled out as the model's tokenizer spells them."""
        return self.plain(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[Tokens]:
        """The tokens of texts in the copy's spelling, those that begin in a span as trained.

        Where a span would begin inside of a token, the text before it is encoded by itself, as it
        is when the model continues it.

        Raises:
            InputError: the tokenizer refuses a text.
        """
        found = []
        encodings = self._encode([text for text, _ in texts])
        for (text, spans), encoding in zip(texts, encodings, strict=True):
            trained = np.zeros(len(encoding), bool)
            whole = True
            for start, end in spans:
                first = _token_at(encoding, start, end)
                if first is not None:
                    whole = whole and _begins(encoding, first) == start
                    trained[first : _token_after(encoding, end, len(text))] = True
            tokens = Tokens(np.array(encoding.ids, np.int64), trained)
            found.append(tokens if whole else self._cut_apart(text, spans))
        return found

    def _cut_apart(self, text: str, spans: Sequence[Span]) -> Tokens:
        """The tokens of a text that is cut where a span begins."""
        borders = [0, *(start for start, _ in spans), len(text)]
        parts = [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        (encoding,) = self._encode([BORDER.join(parts)])
        trained = np.zeros(len(encoding), bool)
        stop = len(text) + len(spans) * len(BORDER)
        for number, (start, end) in enumerate(spans, 1):
            shift = number * len(BORDER)
            first = _token_at(encoding, start + shift, end + shift)
            if first is not None:
                trained[first : _token_after(encoding, end + shift, stop)] = True
        ids = np.array(encoding.ids, np.int64)
        kept = ids != self._border
        return Tokens(ids[kept], trained[kept])

    def _encode(self, texts: list[str]) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the tokenizer cannot encode a text ({reason})") from error


def _token_at(encoding: Encoding, place: int, stop: int) -> int | None:
    """The first token that has a character of [place, stop); None if there is none.

    White space beside a special token may belong to no token.
    """
    for character in range(place, stop):
        token = encoding.char_to_token(character)
        if token is not None:
            return token
    return None


def _token_after(encoding: Encoding, place: int, stop: int) -> int:
    """The first token that begins at `place` or behind it; their number if there is none."""
    token = _token_at(encoding, place, stop)
    if token is None:
        return len(encoding)
    return token + (_begins(encoding, token) < place)


def _begins(encoding: Encoding, token: int) -> int:
    """The first character of a token that has one."""
    characters = encoding.token_to_chars(token)
    assert characters is not None
    return characters[0]


def _copy(path: Path, key: str) -> tuple[Tokenizer, dict[str, int]]:
    """The copy, with the token BORDER, and the ids of special tokens by their own spelling."""
    tree = json.loads(read_text(path, key))
    special = [token for token in tree["added_tokens"] if token["special"]]
    ids = {token["content"]: token["id"] for token in special}
    names = {text: f"{BEGIN}{number}{END}" for text, number in ids.items()}
    for token in special:
        token.update(content=names[token["content"]], normalized=False)
    model = tree["model"]
    if isinstance(model["vocab"], list):  # of pieces and their scores
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    elif names.keys() & model["vocab"].keys():
        model["vocab"] = {names.get(text, text): n for text, n in model["vocab"].items()}
        if "merges" in model:  # a text is never merged to a special token
            model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    # A post-processor adds tokens, and moves the characters that tokens are said to have.
    tree.update(post_processor=None, truncation=None, padding=None)
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([AddedToken(BORDER, special=True, normalized=False)])
    return tokenizer, ids


def _merged(merge: Any) -> str:
    """The text that a merge of a BPE makes: "a b" -> "ab"; newer files hold ["a", "b"]."""
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
