"""What single tokens are as text and as bytes, for log-probabilities.

    texts = TokenTexts(tokenizer)
    texts.text(464)      -> " river"
    texts.bytes(464)     -> [32, 114, 105, 118, 101, 114]

A token may be a part of a character: its text then has U+FFFD, and its bytes say which part it is.
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """A tokenizer's tokens.

    Args:
        tokenizer: of any kind.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token: int) -> str:
        """The token decoded alone; a special one is spelled out."""
        return self._of(token)[0]

    def bytes(self, token: int) -> list[int]:
        """The bytes that the token stands for."""
        return self._of(token)[1]

    def _of(self, token: int) -> tuple[str, list[int]]:
        if token not in self._known:
            text = self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            assert isinstance(text, str)
            self._known[token] = (text, self._bytes(token, text))
        return self._known[token]

    def _bytes(self, token: int, text: str) -> list[int]:
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        if "\ufffd" not in text or token in self._special or not isinstance(spelled, str):
            return list(text.encode())
        if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
            return [int(spelled[3:5], 16)]
        letters = byte_letters()
        if all(letter in letters for letter in spelled):
            return [letters[letter] for letter in spelled]
        return list(text.encode())


@cache
def byte_letters() -> dict[str, int]:
    """The letter by which byte-level tokenizers spell each byte -> the byte.

    GPT-2's table (github.com/openai/gpt-2, src/encoder.py): bytes that are visible in Latin-1 are
    themselves, the others the letters from U+0100 on, in their order.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
