"""Records -> conversations: the fields that hold them, their roles, and what is trained.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}         texts, or lists of messages
    {"text": "All of it is trained."}             replay of pretraining text

`data.sources.N.fields` gives other names for a source, or one of `PRESETS`. The answers are the
messages of the assistant; one with `weight: 0` is context, as all messages of a prompt are.

What would surprise: roles must come in order. The system's message (if any) is the first, then
users and assistants take turns; tools answer an assistant and are answered by one. A template would
render anything else too, but as a conversation that never takes place.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmnorm.data.records import Record, half_a_pair, lacks
from llmnorm.data.settings import PRESETS, SourceSettings
from llmnorm.machine.reading import parse_json
from llmnorm.part import InputError, nearest

PLAIN = {"role", "content"}  # the keys of most messages
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
# After which messages one of this role may stand; "" is the beginning.
_AFTER = {
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Unusable(InputError):
    """A record that is no conversation; the message says what is wrong with it."""


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        messages: as the template is given them.
        answers: which of them are trained, by number; at least one.
        tools: JSON schemas of functions; None if there are none.
    """

    messages: list[dict[str, Any]]
    answers: list[int]
    tools: list[Any] | None = None

    @property
    def canonical(self) -> str:
        """The same text for the same conversation, whatever file it stood in."""
        return json.dumps(self._asdict(), sort_keys=True, ensure_ascii=False)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all that its messages say."""
        return sum(_size(message.get("content")) for message in self.messages)


def _size(content: Any) -> int:
    return len(content.encode()) if isinstance(content, str) else 0


class Reader:
    """Makes conversations, or plain texts, of a source's records.

    Args:
        source: its settings.

    Attributes:
        fields: of a record, that are read.
    """

    def __init__(self, source: SourceSettings) -> None:
        given = PRESETS[source.fields] if isinstance(source.fields, str) else source.fields or {}
        names = {name: given.get(name, name) for name in ("messages", "prompt", "completion")}
        self._text, self._tools = source.text_field, given.get("tools", "tools")
        self._role, self._content = given.get("role", "role"), given.get("content", "content")
        self._names_are_usual = (self._role, self._content) == ("role", "content")
        self._names = names
        self._input, self._system = given.get("input"), given.get("system")
        more = [name for name in (self._input, self._system) if name is not None]
        self.fields = list(dict.fromkeys([self._text, *names.values(), self._tools, *more]))

    def read(self, record: Record) -> Conversation | str:
        """The conversation or the text that a record holds.

        Raises:
            Unusable: it holds none.
        """
        fields = {name: value for name, value in record.fields.items() if value is not None}
        names = self._names
        try:
            if names["messages"] in fields:
                return self._conversation(fields, self._messages(fields, names["messages"]), 0)
            if names["prompt"] in fields and names["completion"] in fields:
                prompt = self._messages(fields, names["prompt"], "user")
                completion = self._messages(fields, names["completion"], "assistant")
                return self._conversation(fields, [*prompt, *completion], len(prompt))
            if self._text in fields:
                return self._plain(fields)
        except Unusable as error:
            raise Unusable(f"{record.where}: {error}") from None
        wanted = [names["messages"], f"{names['prompt']} and {names['completion']}", self._text]
        raise Unusable(f"{record.where}: {lacks(fields, wanted)} (data.sources.N.fields)")

    def _plain(self, fields: Mapping[str, Any]) -> str:
        text = fields[self._text]
        if not isinstance(text, str):
            raise Unusable(f"the field '{self._text}' holds {type(text).__name__}, not text")
        if problem := half_a_pair(text):
            raise Unusable(problem)
        if not text:
            raise Unusable(f"the field '{self._text}' holds no text")
        return text

    def _messages(self, fields: Mapping[str, Any], name: str, role: str | None = None) -> list[Any]:
        """The messages in a field; a text is one message of this role."""
        found = fields[name]
        if isinstance(found, str) and role is not None:
            more = fields.get(self._input or "") if role == "user" else None
            return [{"role": role, "content": f"{found}\n\n{more}" if more else found}]
        if not isinstance(found, list) or not found:
            kind = "no messages" if found == [] else f"{type(found).__name__}, not messages"
            raise Unusable(f"the field '{name}' holds {kind}")
        return [self._renamed(message) for message in found]

    def _renamed(self, message: Any) -> Any:
        """A message with the keys that templates read."""
        if not isinstance(message, Mapping):
            return message
        if self._names_are_usual:
            return message
        names = {self._role: "role", self._content: "content"}
        return {names.get(key, key): value for key, value in message.items()}

    def _conversation(
        self, fields: Mapping[str, Any], given: list[Any], first: int
    ) -> Conversation:
        """Messages, checked.

        Args:
            first: the first message that is trained.
        """
        if self._system and (system := fields.get(self._system)):
            given, first = [{"role": "system", "content": system}, *given], first + 1
        messages: list[dict[str, Any]] = []
        answers = []
        for number, message in enumerate(given):
            checked, trained = _checked(message, messages[-1]["role"] if messages else "", number)
            messages.append(checked)
            if trained and number >= first:
                answers.append(number)
        if not answers:
            raise Unusable("has no answer to train: no message of the assistant that counts")
        tools = _tools(fields.get(self._tools), self._tools)
        if problem := _unwritable(messages, tools):
            raise Unusable(problem)
        return Conversation(messages, answers, tools)


def asked(given: Any) -> list[dict[str, Any]]:
    """Messages that are to be answered, as templates read them.

    Raises:
        Unusable: they are no messages, their roles are out of order, or the last one is an answer.
    """
    if not isinstance(given, list) or not given:
        kind = "no messages" if given == [] else f"{type(given).__name__}, not messages"
        raise Unusable(f"the field 'messages' holds {kind}")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(given):
        before = messages[-1]["role"] if messages else ""
        messages.append(_checked(message, before, number)[0])
    if messages[-1]["role"] not in ("user", "tool"):
        raise Unusable(f"the last message is of role '{messages[-1]['role']}'; nothing is asked")
    if problem := _unwritable(messages, None):
        raise Unusable(problem)
    return messages


def _checked(message: Any, before: str, number: int) -> tuple[dict[str, Any], bool]:
    """A message as templates read it, and whether it is an answer that is trained."""
    where = f"message {number + 1}"
    if not isinstance(message, Mapping):
        raise Unusable(f"{where} is {type(message).__name__}, not an object with role and content")
    found = {key: value for key, value in message.items() if value is not None}
    weight = found.pop("weight", None)
    role = found.get("role")
    if not isinstance(role, str):
        raise Unusable(f"{where} has no role; {nearest('role', [str(key) for key in message])}")
    role = found["role"] = ALIASES.get(role, role)
    if role not in ROLES:
        raise Unusable(f"{where}: role '{role:.40}' is not known; {nearest(role, list(ROLES))}")
    if before not in _AFTER[role]:
        follows = f"follows one of role '{before}'" if before else "comes first"
        raise Unusable(f"{where}: roles are out of order: one of role '{role}' {follows}")
    if weight is not None and (weight not in (0, 1) or (weight and role != "assistant")):
        raise Unusable(f"{where}: weight must be 0 or, for an answer, 1; got {weight!r:.40}")
    if "content" in found:
        found["content"] = _text_of(found["content"], where)
    elif not (role == "assistant" and found.keys() - {"role"}):
        raise Unusable(f"{where} has no content; {nearest('content', [str(k) for k in message])}")
    return found, role == "assistant" and weight != 0


def _unwritable(messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
    """What of a conversation is no text or JSON; None if nothing."""
    for message in messages:
        if problem := half_a_pair(message.get("content", "")):
            return problem
    if tools is None and all(message.keys() <= PLAIN for message in messages):
        return None
    more = [{k: v for k, v in m.items() if k not in PLAIN} for m in messages]
    try:
        return half_a_pair(json.dumps([more, tools], ensure_ascii=False))
    except TypeError as error:  # a table may hold times, or bytes
        return f"a message holds what JSON cannot ({error})"


def _text_of(content: Any, where: str) -> str:
    """A content as one text; OpenAI's format allows a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise Unusable(f"{where}: content holds {type(content).__name__}, not text")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Unusable(f"{where}: content has a part of type '{kind}'; only text is read")
    return "".join(part["text"] for part in content)


def _tools(given: Any, name: str) -> list[Any] | None:
    """The tools of a record; tables keep them as JSON, since each has fields of its own."""
    found = given
    if isinstance(given, str):
        try:
            found = parse_json(given, name) if given.strip() else None
        except InputError as error:
            raise Unusable(f"the field {error}") from None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise Unusable(f"the field '{name}' must hold a list of JSON schemas")
    return found
