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

import bisect
import itertools
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
        self._names = {text: f"{BEGIN}{number}{END}" for text, number in self._ids.items()}
        self._spelled = {number: text for text, number in self._ids.items()}
        self._border = self._tokenizer.token_to_id(BORDER)
        self._can_cut = self._keeps_apart()
        longest_first = sorted(self._ids, key=len, reverse=True)
        token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._special = re.compile(token)
        self._alone = re.compile(f"({token})")  # found 20 times faster than what is below
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
            if self._special.search(value) is None:
                return value
            return self._special.sub(lambda token: f"{OPEN}{token[0]}{CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(inner) for inner in value]
        return value

    def respell(self, raw: str, spans: Sequence[Span] = ()) -> tuple[str, list[Span]]:
        """A template's text in the copy's spelling, and where spans of it lie then."""
        if not (OPEN in raw or CLOSE in raw or "\\u" in raw):
            return self._respell_unmarked(raw, spans)
        places = sorted({place for span in spans for place in span})
        moved: dict[int, int] = {}
        parts, size, last = [], 0, 0
        for found in self._found.finditer(raw):
            while places and places[0] <= found.start():
                place = places.pop(0)
                moved[place] = size + place - last
            spelled, token = found.groups()
            part = raw[last : found.start()]
            part += self._names[token] if token else spelled or ""
            parts.append(part)
            size, last = size + len(part), found.end()
            while places and places[0] <= last:  # inside of the token, or at its end
                moved[places.pop(0)] = size
        moved |= {place: size + place - last for place in places}
        text = "".join([*parts, raw[last:]])
        return text, [(moved[start], moved[end]) for start, end in spans]

    def _respell_unmarked(self, raw: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """`respell` of a text without marks, in a third of the time."""
        parts = self._alone.split(raw)  # text, token, text, ...
        before = list(itertools.accumulate(map(len, parts))) if spans else []
        parts[1::2] = [self._names[token] for token in parts[1::2]]
        after = list(itertools.accumulate(map(len, parts))) if spans else []

        def moved(place: int) -> int:
            part = bisect.bisect_left(before, place)  # the first that ends at the place or later
            if part % 2 or before[part] == place:  # inside of a token: behind it
                return after[part]
            return after[part] - before[part] + place

        return "".join(parts), [(moved(start), moved(end)) for start, end in spans]

    def plain(self, text: str) -> str:
        """A text in the copy's spelling, as the model's tokenizer spells it."""
        return SPECIAL.sub(lambda found: self._spelled[int(found[1])], text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, special ones spelled out as the model's tokenizer spells them."""
        return self.plain(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[Tokens]:
        """The tokens of texts in the copy's spelling, those of the spans as trained.

        A span is encoded apart from the text before it, as it is when the model continues that
        text. Tokenizers that would put a space before it, or take white space away, encode the
        whole text; tokens that begin in the span are then trained.

        Raises:
            InputError: the tokenizer refuses a text.
        """
        if not self._can_cut:
            encodings = self._encode([text for text, _ in texts])
            spans = [spans for _, spans in texts]
            return [_by_places(*both) for both in zip(encodings, spans, strict=True)]
        lists = [e.ids for e in self._encode([_with_borders(*t) for t in texts], places=False)]
        count = sum(map(len, lists))
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.int64, count)
        border = ids == self._border
        trained = np.cumsum(border) % 2 == 1  # a text has two borders a span
        ids, trained = ids[~border], trained[~border]
        sizes = [len(found) - 2 * len(s) for found, (_, s) in zip(lists, texts, strict=True)]
        ends = [0, *itertools.accumulate(sizes)]
        return [Tokens(ids[a:b], trained[a:b]) for a, b in itertools.pairwise(ends)]

    def _keeps_apart(self) -> bool:
        """Whether texts that BORDER keeps apart become nothing but their own letters."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip for token in added):
            return False
        apart, whole = self._encode([f"a{BORDER}b", "ab"])
        return "".join(apart.tokens).replace(BORDER, "") == "".join(whole.tokens)

    def _encode(self, texts: list[str], *, places: bool = True) -> list[Encoding]:
        """Encodings; without the tokens' places in the text it takes a sixth less time."""
        encode = self._tokenizer.encode_batch if places else self._tokenizer.encode_batch_fast
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the tokenizer cannot encode a text ({reason})") from error


def _with_borders(text: str, spans: Sequence[Span]) -> str:
    """The text with a BORDER where a span begins and where it ends."""
    places = [0, *(place for span in spans for place in span), len(text)]
    return BORDER.join(text[a:b] for a, b in zip(places, places[1:], strict=False))


def _by_places(encoding: Encoding, spans: Sequence[Span]) -> Tokens:
    """The tokens of a text that was encoded as a whole."""
    begins = np.array([start for start, _ in encoding.offsets], np.int64)
    trained = np.zeros(len(begins), bool)
    for start, end in spans:
        trained |= (start <= begins) & (begins < end)
    return Tokens(np.array(encoding.ids, np.int64), trained)


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
