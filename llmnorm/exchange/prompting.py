"""What a user asks for, as tokens of one model: a text to be continued, or messages to be answered.

    asker = Asker(tokenizer, directory, vocabulary)
    asker.text("The river")                                  as the beginning of a document
    asker.messages([{"role": "user", "content": "2+2?"}])    by the chat template

The chat template is read with the first messages, so that a model without one continues texts.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmnorm.data.chat import ChatTemplate
from llmnorm.data.messages import asked
from llmnorm.generation.prompts import prompt_tokens
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Asker:
    """`generation.requests.Prompts` of a model.

    Args:
        tokenizer: which begins texts as documents in training began.
        directory: of the tokenizer; its chat template renders messages as in training.
        vocabulary: tokens that the model has.
        key: what asked for answers to messages, for the template's errors.

    Attributes:
        directory, vocabulary: as given.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        directory: Path,
        vocabulary: int,
        key: str = "messages",
    ) -> None:
        self._tokenizer, self.directory, self._key = tokenizer, directory, key
        self.vocabulary = vocabulary

    @property
    def stops(self) -> frozenset[int]:
        """What ends an answer to messages, beside the model's own end tokens.

        Raises:
            InputError: there is no chat template, or it cannot render a question and an answer.
        """
        return frozenset(self._template.stops)

    def text(self, text: str) -> list[int]:
        """The tokens of a text to be continued.

        Raises:
            InputError: that is no token at all, or one that the model does not have.
        """
        return self._known(prompt_tokens(self._tokenizer, text))

    def messages(self, messages: Any) -> list[int]:
        """The tokens of messages to be answered, up to where the answer begins.

        Raises:
            InputError: they are no messages, there is no template, it cannot render them, or it
                writes tokens that the model does not have.
        """
        return self._known(self._template.render(asked(messages), generation_prompt=True))

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.directory, key=self._key)

    def _known(self, tokens: list[int]) -> list[int]:
        if max(tokens) >= self.vocabulary:
            raise InputError(
                f"{self._key}: {self.directory} has a token with the id {max(tokens)}, the model "
                f"has {self.vocabulary}; give the adapter that was trained with it (--adapter)"
            )
        return tokens
