"""A row's text as its tokens come: whole characters only, ended by stop strings.

    stream = TextStream(tokenizer, stop=["\\nUser:"])
    stream.push(15)    -> "Hello"
    stream.push(198)   -> ""           a line's end may be the beginning of the stop
    stream.push(33)    -> "\\nB"
    stream.finish()    -> ""

The pieces joined are the tokens decoded at once, up to the stop. So that a piece costs the same
however long the text is, a window of the last tokens is decoded: it begins where a text was
complete, with at least one token before the new ones, since many tokenizers drop the space before a
first word.

What would surprise: `tokenizers.decoders.DecodeStream` does the same for text that a model has
learned, and raises an error for bytes that are no UTF-8, which a sampled text may hold. And where a
tokenizer has tokens of one byte beside those of words ("<0xE4>"), a whole character followed by a
broken one keeps its meaning here; decoded at once the whole run of bytes would be replaced.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
CONTEXT = 4  # tokens before a row's first one that are decoded with it
UNFINISHED = 3  # bytes, and so replaced characters, that the next token may make whole


class TextStream:
    """Decodes one row's tokens.

    Args:
        tokenizer: of any kind.
        stop: texts that end the row's, and are no part of it.
        skip_special: special tokens (of beginnings, ends, turns) are no part of the text.
        before: tokens that the row's first one follows, which decides whether its space is dropped.

    Attributes:
        stopped: a stop has come; the text behind its beginning is dropped.

    Raises:
        InputError: a stop is empty.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[str] = (),
        *,
        skip_special: bool = True,
        before: Sequence[int] = (),
    ) -> None:
        if "" in stop:
            raise InputError("stop: one of the texts is empty, and would end every answer at once")
        self.stopped = False
        self._tokenizer, self._stop, self._skip_special = tokenizer, tuple(stop), skip_special
        self._window: list[int] = []
        self._known = 0  # so many of the window's tokens had a complete text when they came
        self._told = ""  # the beginning of the window's text, which was passed on
        self._held = ""  # text that may be the beginning of a stop
        self._begin_behind(before)

    def push(self, token: int) -> str:
        """The text that is complete with this token and that no stop can take back any more."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._text()
        unfinished = min(len(text) - len(text.rstrip(BROKEN)), UNFINISHED)
        new = text[len(self._told) : len(text) - unfinished]
        self._told += new
        if not unfinished:
            last = self._decoded(self._window[self._known :])
            if last:  # or the window would begin with tokens that a decoder skips
                self._window, self._told = self._window[self._known :], last
            self._known = len(self._window)
        return self._without_stops(new, end=False)

    def finish(self) -> str:
        """The rest of the text; bytes that did not become a character are replaced."""
        if self.stopped:
            return ""
        new = self._text()[len(self._told) :]
        self._told += new
        return self._without_stops(new, end=True)

    def _begin_behind(self, before: Sequence[int]) -> None:
        """Begin the window with some of `before` that are seen as text, if there are any."""
        count = CONTEXT
        told = self._decoded(list(before[-count:]))
        while not told and count < len(before):
            count *= 2
            told = self._decoded(list(before[-count:]))
        if told and not told.endswith(BROKEN):  # or the row's first token may make it whole
            self._window, self._told = list(before[-count:]), told
            self._known = len(self._window)

    def _text(self) -> str:
        """The window's text; the window becomes shorter where tokens change those before them.

        Tokens of one byte do, which are decoded by runs: <E6> <97> <A5> is a character, and with
        one more <E6> behind it four broken ones.
        """
        text = self._decoded(self._window)
        if not text.startswith(self._told):
            self._window, self._known, self._told = self._window[self._known :], 0, ""
            text = self._decoded(self._window)
        return text

    def _decoded(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _without_stops(self, new: str, *, end: bool) -> str:
        """What can be passed on of the held text and the new one."""
        if not self._stop:
            return new
        text, self._held = self._held + new, ""
        hits = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self.stopped = True
            return text[: min(hits)]
        if not end:
            held = max(_overlap(text, stop) for stop in self._stop)
            if held:
                text, self._held = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins, and does not end.

    "one\\nUs", "\\nUser:" -> 3
    """
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
