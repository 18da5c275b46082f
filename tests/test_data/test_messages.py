"""Records become conversations: every form that is read, and what is refused in one line."""

from typing import Any

import pytest

from llmnorm.data.messages import Conversation, Reader, Unusable, asked
from llmnorm.data.records import Record
from llmnorm.data.settings import SourceSettings

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read(record: dict[str, Any], **source: Any) -> Conversation | str:
    settings = SourceSettings(name="s", path="x.jsonl", **source)
    return Reader(settings).read(Record("x.jsonl:7", record))


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], Conversation | str]] = {
    "messages": (
        {"messages": [SYSTEM, QUESTION, ANSWER]},
        {},
        Conversation([SYSTEM, QUESTION, ANSWER], [2]),
    ),
    "keys without a value": (
        {"messages": [QUESTION | {"weight": None, "name": None}, ANSWER], "tools": None},
        {},
        Conversation([QUESTION, ANSWER], [1]),
    ),
    "a weight of 0": (
        {"messages": [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]},
        {},
        Conversation([QUESTION, ANSWER, QUESTION, ANSWER], [3]),
    ),
    "texts": ({"prompt": "Q", "completion": "A"}, {}, Conversation([QUESTION, ANSWER], [1])),
    "lists": (
        {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, QUESTION, ANSWER]},
        {},
        Conversation([QUESTION, ANSWER, QUESTION, ANSWER, QUESTION, ANSWER], [3, 5]),
    ),
    "text": ({"text": "all of it"}, {}, "all of it"),
    "text of another field": ({"body": "all of it"}, {"text_field": "body"}, "all of it"),
    "tools": (
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "1"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
        {},
        Conversation(
            [
                QUESTION,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "1"},
                ANSWER,
            ],
            [1, 3],
            TOOLS,
        ),
    ),
    "tools as JSON": (
        {"messages": [QUESTION, ANSWER], "tools": '[{"name": "f"}]'},
        {},
        Conversation([QUESTION, ANSWER], [1], [{"name": "f"}]),
    ),
    "content in parts": (
        {"messages": [QUESTION | {"content": [{"type": "text", "text": "Q"}]}, ANSWER]},
        {},
        Conversation([QUESTION, ANSWER], [1]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
            "system": "S",
        },
        {"fields": "sharegpt"},
        Conversation([SYSTEM, QUESTION, ANSWER], [2]),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 3", "output": "5", "text": "not read"},
        {"fields": "alpaca"},
        Conversation(
            [{"role": "user", "content": "Add.\n\n2 3"}, {"role": "assistant", "content": "5"}], [1]
        ),
    ),
    "alpaca without input": (
        {"instruction": "Q", "input": "", "output": "A"},
        {"fields": "alpaca"},
        Conversation([QUESTION, ANSWER], [1]),
    ),
    "fields of one's own": (
        {"chat": [{"who": "user", "says": "Q"}, {"who": "assistant", "says": "A"}]},
        {"fields": {"messages": "chat", "role": "who", "content": "says"}},
        Conversation([QUESTION, ANSWER], [1]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_record(form: str) -> None:
    """Oracle: the conversation, written out."""
    fields, source, expected = FORMS[form]
    assert read(fields, **source) == expected


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "other fields": (
        {"dialogue": []},
        "there is none of the fields messages, prompt and completion, text; the fields are: "
        "dialogue",
    ),
    "no messages": ({"messages": []}, "the field 'messages' holds no messages"),
    "messages that are text": ({"messages": "hi"}, "the field 'messages' holds str, not messages"),
    "a message that is text": (chat("hi"), "message 1 is str, not an object"),
    "no role": (chat({"rule": "user", "content": "Q"}), "message 1 has no role; did you mean"),
    "an unknown role": (
        chat({"role": "usr", "content": "Q"}),
        "message 1: role 'usr' is not known; did you mean 'user'",
    ),
    "no content": (chat({"role": "user", "text": "Q"}), "message 1 has no content"),
    "content that is a number": (
        chat(QUESTION | {"content": 3}),
        "message 1: content holds int, not text",
    ),
    "a picture": (
        chat(QUESTION | {"content": [{"type": "image_url", "image_url": "x"}]}),
        "message 1: content has a part of type 'image_url'; only text is read",
    ),
    "an answer first": (
        chat(ANSWER, QUESTION),
        "message 1: roles are out of order: one of role 'assistant' comes first",
    ),
    "two questions": (
        chat(QUESTION, QUESTION, ANSWER),
        "message 2: roles are out of order: one of role 'user' follows one of role 'user'",
    ),
    "two answers": (chat(QUESTION, ANSWER, ANSWER), "message 3: roles are out of order"),
    "a late system message": (chat(QUESTION, SYSTEM), "message 2: roles are out of order"),
    "a tool without a call": (
        chat(QUESTION, {"role": "tool", "content": "1"}),
        "message 2: roles are out of order",
    ),
    "no answer": (chat(SYSTEM, QUESTION), "has no answer to train"),
    "only context": (chat(QUESTION, ANSWER | {"weight": 0}), "has no answer to train"),
    "half a weight": (
        chat(QUESTION, ANSWER | {"weight": 0.5}),
        "message 2: weight must be 0 or, for an answer, 1; got 0.5",
    ),
    "a question's weight": (chat(QUESTION | {"weight": 1}, ANSWER), "message 1: weight must be 0"),
    "half a character": (chat(QUESTION | {"content": "\ud800"}, ANSWER), "not UTF-8 text"),
    "half a character in a call": (
        chat(QUESTION, {"role": "assistant", "tool_calls": [{"name": "\ud800"}]}),
        "not UTF-8 text",
    ),
    "bytes in a call": (
        chat(QUESTION, {"role": "assistant", "tool_calls": [{"name": b"f"}]}),
        "a message holds what JSON cannot",
    ),
    "tools that are no JSON": (
        chat(QUESTION, ANSWER) | {"tools": "[{"},
        "the field tools: not JSON",
    ),
    "tools that are text": (
        chat(QUESTION, ANSWER) | {"tools": '"f"'},
        "the field 'tools' must hold a list of JSON schemas",
    ),
    "an empty text": ({"text": ""}, "the field 'text' holds no text"),
    "a number as text": ({"text": 3}, "the field 'text' holds int, not text"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_conversation_is_one_line(mistake: str) -> None:
    """Oracle: file, line and message, written out."""
    fields, message = MISTAKES[mistake]
    with pytest.raises(Unusable) as caught:
        read(fields)
    assert str(caught.value).startswith(f"x.jsonl:7: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("sharegtp", "'sharegtp' is no preset; did you mean 'sharegpt'?"),
        ({"mesages": "chat"}, "'mesages' is not known; did you mean 'messages'?"),
    ],
)
def test_fields_that_do_not_exist_are_refused(fields: Any, message: str) -> None:
    """Oracle: the nearest valid choice."""
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        SourceSettings(name="s", path="x.jsonl", fields=fields)


def test_the_same_conversation_has_one_canonical_text() -> None:
    """Oracle: equality, for keys in another order and without a value."""
    first = read({"messages": [QUESTION, ANSWER], "tools": []})
    second = read(
        {
            "messages": [
                {"content": "Q", "name": None, "role": "human"},
                dict(reversed(ANSWER.items())),
            ]
        }
    )
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.canonical == second.canonical
    assert first.bytes == 2


def test_messages_that_ask_something_are_taken_as_templates_read_them() -> None:
    """Oracle: the messages written out; parts of content are joined, keys without a value go."""
    given = [
        {"role": "system", "content": "Be short."},
        {
            "role": "human",
            "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2"}],
        },
        {"role": "assistant", "content": "4", "name": None},
        {"role": "user", "content": "And 3+3?"},
    ]
    assert asked(given) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3+3?"},
    ]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "holds no messages"),
        ("2+2?", "holds str, not messages"),
        ([{"role": "assistant", "content": "4"}], "out of order"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "out of order"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "nothing is asked",
        ),
        ([{"role": "system", "content": "a"}], "nothing is asked"),
        ([{"role": "user", "content": "\ud800"}], "not UTF-8"),
        ([{"role": "user"}], "has no content"),
        (["2+2?"], "message 1 is str"),
    ],
)
def test_messages_that_ask_nothing_are_refused(given: object, complaint: str) -> None:
    """Oracle: the reason."""
    with pytest.raises(Unusable, match=complaint):
        asked(given)
