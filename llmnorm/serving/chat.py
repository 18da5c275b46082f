"""Messages as prompts: the model's chat template, one of the operator's, or plain lines.

    chat, says = chat_of(target.asker, settings)
    chat.tokens(messages, ...)      -> token ids
    chat.stops, chat.stop           what ends an answer, beside the model's own end tokens

What would surprise: a model without a template is served, and refuses messages; `fallback` must be
asked for, since a base model answers lines of "User:" only by accident.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.config.serving import ServingSettings
from llmnorm.data.chat import ChatTemplate
from llmnorm.data.messages import asked
from llmnorm.data.settings import CHAT_TEMPLATE, TOKENIZER_FILES
from llmnorm.exchange.prompting import Asker
from llmnorm.machine.reading import read_text
from llmnorm.part import InputError
from llmnorm.serving.refusals import Refusal

KEY = "serving.chat_template"
SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


class Talk(NamedTuple):
    """Messages in their order, and what is made of them.

    Attributes:
        arguments: values for the template.
        answer: end with what stands before an answer.
        begun: the last message is an answer that goes on.
    """

    messages: list[dict[str, Any]]
    arguments: Mapping[str, Any]
    answer: bool
    begun: bool


@dataclass(frozen=True)
class Chat:
    """What makes prompts of messages.

    Attributes:
        render: makes the tokens.
        stops: tokens that end an answer.
        stop: texts that end one.
    """

    render: Callable[[Talk], list[int]]
    stops: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    def tokens(
        self,
        messages: Sequence[Any],
        arguments: Mapping[str, Any],
        *,
        answer: bool = True,
        begun: bool = False,
    ) -> list[int]:
        """The tokens of messages; the arguments are `Talk`'s.

        Raises:
            Refusal, InputError: they are not in order, or cannot be rendered.
        """
        given = _to_continue(messages) if begun else asked(list(messages))
        return self.render(Talk(given, arguments, answer, begun))


def chat_of(asker: Asker, settings: ServingSettings) -> tuple[Chat, str]:
    """What makes prompts of messages, and a clause about it.

    Raises:
        InputError: the template of `settings` cannot be used.
    """
    named = settings.chat_template
    if named == "fallback":
        chat = Chat(partial(_lines, asker), stop=("\nUser:",))
        return chat, "plain lines, `User: ...` (serving.chat_template=fallback)"
    if named is not None:
        return _templated(_with_template(asker.directory, Path(named))), f"by {named}"
    try:
        return _templated(ChatTemplate(asker.directory, key=KEY)), "by the model's chat template"
    except InputError:
        return Chat(_refuse), "refused, there is no chat template (serving.chat_template)"


def _with_template(directory: Path, file: Path) -> ChatTemplate:
    """The template of a file, for the tokenizer of a directory."""
    text = read_text(file, KEY)
    with tempfile.TemporaryDirectory() as copy:
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, Path(copy) / name)
        (Path(copy) / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
        return ChatTemplate(Path(copy), key=KEY, called=str(file))


def _templated(template: ChatTemplate) -> Chat:
    """By a chat template."""

    def render(talk: Talk) -> list[int]:
        filled = template.with_arguments(talk.arguments) if talk.arguments else template
        if talk.begun:
            return filled.begun(talk.messages)
        return filled.render(talk.messages, generation_prompt=talk.answer)

    return Chat(render, stops=frozenset(template.stops))


def _lines(asker: Asker, talk: Talk) -> list[int]:
    """Lines of a dialogue, for base models.

    Raises:
        Refusal: there is no template for arguments.
    """
    if talk.arguments:
        name = "chat_template_kwargs"
        raise Refusal(400, f"{name}: there is no template", "unsupported_parameter", param=name)
    text = ""
    for message in talk.messages:
        content = message.get("content", "")
        speaker = SPEAKERS.get(message["role"])
        text += f"{speaker}: {content}\n" if speaker else f"{content}\n\n"
    if talk.begun:
        text = text.removesuffix("\n")
    elif talk.answer:
        text += "Assistant:"
    return asker.text(text)


def _refuse(_: Talk) -> list[int]:
    """Refuse all messages, for a model that has no template."""
    raise Refusal(
        400,
        "messages: the model has no chat template, and none is set; the server's operator sets "
        "serving.chat_template to a file with one, or to fallback. /v1/completions needs none",
        "chat_template_missing",
        param="messages",
    )


def _to_continue(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages that are in order, the last one an answer with a text."""
    before = asked(list(messages[:-1]))
    content = messages[-1].get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise Refusal(
            400,
            "continue_final_message: the last message has no text",
            "invalid_value",
            param="messages",
        )
    return [*before, {"role": "assistant", "content": content}]
