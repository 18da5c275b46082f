"""Chat templates: what is trained, what is encoded, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmnorm.data.chat import ChatTemplate, Refused
from llmnorm.data.settings import TokenizerSettings
from llmnorm.data.spelling import BEGIN, CLOSE, OPEN, Speller
from llmnorm.data.templates import missing_tokens, write_template
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.part import InputError
from tests.test_data import chats
from tests.test_data.chats import TWO_TURNS, save_tokenizer

THOUGHTS = [
    {**message, "reasoning_content": f"of {message['content']}"}
    if message["role"] == "assistant"
    else message
    for message in TWO_TURNS
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatTemplate]:
    """`template("headers")` -> a byte-level tokenizer with this template, made once."""
    made: dict[str, ChatTemplate] = {}

    def make(name: str) -> ChatTemplate:
        if name not in made:
            made[name] = ChatTemplate(save_tokenizer(tmp_path_factory.mktemp(name), name))
        return made[name]

    return make


def trained(chat: ChatTemplate, messages: Any, answers: list[int] | None = None) -> list[list[str]]:
    """The trained texts of each example, one for each run of trained tokens."""
    found = []
    answers = [1, 3] if answers is None else answers
    for tokens in chat.encode(chat.examples(messages, answers)):
        runs: list[list[int]] = [[]]
        for number, counts in zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True):
            if counts:
                runs[-1].append(number)
            elif runs[-1]:
                runs.append([])
        found.append([chat.spell(run) for run in runs if run])
    return found


CASES: dict[str, tuple[str, Any, list[list[str]], int]] = {
    "ChatML": ("chatml", TWO_TURNS, [["It is 4.<|im_end|>", "6<|im_end|>"]], 0),
    "headers": ("headers", TWO_TURNS, [["It is 4.<|eot_id|>", "6<|eot_id|>"]], 0),
    "one more token at the end": (
        "after_last",
        TWO_TURNS,
        [["It is 4.<|end|>", "6<|end|>"]],
        0,
    ),
    "dropped thoughts": (
        "drops_thoughts",
        THOUGHTS,
        [
            ["<think>\nof It is 4.\n</think>\n\nIt is 4.<|im_end|>"],
            ["<think>\nof 6\n</think>\n\n6<|im_end|>"],
        ],
        0,
    ),
    "an empty thought": (
        "drops_thoughts",
        TWO_TURNS,
        [
            ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"],
            ["<think>\n\n</think>\n\n6<|im_end|>"],
        ],
        0,
    ),
    "another end": (
        "channels",
        TWO_TURNS,
        [
            ["<|channel|>final<|message|>It is 4.<|return|>"],
            ["<|channel|>final<|message|>6<|return|>"],
        ],
        0,
    ),
    "no end": ("no_end", TWO_TURNS, [["\nIt is 4.<|user|>", "\n6"]], 1),
    "marks": ("marked", TWO_TURNS, [["It is 4.<|im_end|>", "6<|im_end|>"]], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained(template: Callable[..., ChatTemplate], case: str) -> None:
    """Oracle: the texts, written out."""
    name, messages, expected, unended = CASES[case]
    chat = template(name)
    assert trained(chat, messages) == expected
    assert sum(r.unended for r in chat.examples(messages, [1, 3])) == unended


def test_the_second_example_has_no_earlier_thought(template: Callable[..., ChatTemplate]) -> None:
    """Oracle: the whole text, written out."""
    chat = template("drops_thoughts")
    first, second = (chat.spell(t.ids) for t in chat.encode(chat.examples(THOUGHTS, [1, 3])))
    assert first.endswith("<think>\nof It is 4.\n</think>\n\nIt is 4.<|im_end|>")
    assert second == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nof 6\n</think>\n\n6<|im_end|>"
    )


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_an_answer_that_is_context_is_not_trained(
    template: Callable[..., ChatTemplate], name: str
) -> None:
    """Oracle: the texts; what follows the last trained answer is left out."""
    chat = template(name)
    assert trained(chat, TWO_TURNS, [3]) == [["6<|im_end|>"]]
    assert trained(chat, TWO_TURNS, [1]) == [["It is 4.<|im_end|>"]]
    (tokens,) = chat.encode(chat.examples(TWO_TURNS, [1]))
    assert chat.spell(tokens.ids).endswith("It is 4.<|im_end|>")


def test_marks_are_those_of_transformers(
    tmp_path: Path, template: Callable[..., ChatTemplate]
) -> None:
    """Oracle: transformers' mask of the model's tokens."""
    other = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, "marked"))
    expected = other.apply_chat_template(
        TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    chat = template("marked")
    (tokens,) = chat.encode(chat.examples(TWO_TURNS, [1, 3]))
    count = len(tokens.ids)
    assert tokens.ids.tolist() == expected["input_ids"][:count]
    assert tokens.trained.tolist() == [m == 1 for m in expected["assistant_masks"][:count]]
    assert not any(expected["assistant_masks"][count:])


KINDS = [chats.byte_level, chats.metaspace, chats.word_pieces, chats.unigram]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["chatml", "headers", "after_last", "drops_thoughts"])
def test_tokens_are_those_of_transformers(
    tmp_path: Path, kind: Callable[[], Tokenizer], name: str
) -> None:
    """Oracle: `apply_chat_template` of the same directory, with and without the prompt."""
    directory = save_tokenizer(tmp_path, name, kind)
    chat, other = ChatTemplate(directory), AutoTokenizer.from_pretrained(directory)
    spaces = [
        {"role": "user", "content": "  2 +\n 2? é"},
        {"role": "assistant", "content": "\n 4 "},
    ]
    for messages in (TWO_TURNS, TWO_TURNS[:1], spaces):
        for prompt in (False, True):
            expected = other.apply_chat_template(
                messages, add_generation_prompt=prompt, return_dict=False
            )
            assert chat.render(messages, generation_prompt=prompt) == expected


def test_a_text_without_marks_is_respelled_as_one_with_marks(tmp_path: Path) -> None:
    """Oracle: the same text behind which a mark stands alone, at every place of it."""
    speller = Speller(save_tokenizer(tmp_path, "chatml") / "tokenizer.json", "key")
    raw = "<s>a<|im_start|><|im_end|>b\n<|im_end|>"
    for text in (raw, raw + "c", "c", ""):
        spans = [(place, len(text)) for place in range(len(text) + 1)]
        assert speller.respell(text, spans) == speller.respell(text + CLOSE, spans)


@pytest.mark.parametrize("answer", ["\n6", " 6", "\n\n", "6 \n"])
def test_an_example_begins_as_the_prompt_of_its_answer(
    template: Callable[..., ChatTemplate], answer: str
) -> None:
    """Oracle: the tokens of the prompt, whatever white space the answer begins with."""
    for name in ("chatml", "after_last", "drops_thoughts"):
        chat = template(name)
        messages = [TWO_TURNS[0], {"role": "assistant", "content": answer}]
        (tokens,) = chat.encode(chat.examples(messages, [1]))
        prompt = chat.render(messages[:1], generation_prompt=True)
        assert tokens.ids[: len(prompt)].tolist() == prompt
        assert tokens.trained.tolist() == [n >= len(prompt) for n in range(len(tokens.ids))]


@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.__name__)
def test_a_special_token_in_a_message_is_text(
    tmp_path: Path, kind: Callable[[], Tokenizer]
) -> None:
    """Oracle: special tokens of the template alone; the message's letters where none are lost."""
    chat = ChatTemplate(save_tokenizer(tmp_path, "headers", kind))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spelled = "a<|eot_id|>b</s><s>"
    messages = [
        {"role": "user", "content": spelled},
        {"role": "assistant", "tool_calls": [{"name": spelled, "arguments": {spelled: [spelled]}}]},
    ]
    plain = json.loads(json.dumps(messages).replace(spelled, "a"))
    special = {tokenizer.token_to_id(token) for token in chats.SPECIAL} - {
        tokenizer.token_to_id("[UNK]")
    }
    ids, of_plain = chat.render(messages, [{"name": spelled}]), chat.render(plain, [{"name": "a"}])
    assert [i for i in ids if i in special] == [i for i in of_plain if i in special]
    if kind is chats.byte_level:
        assert chat.spell(ids).count(spelled) == 5


def test_a_template_that_escapes_letters_smuggles_nothing_in(tmp_path: Path) -> None:
    """Oracle: no special token but the template's one."""
    save_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) + '<|end|>' }}{% endfor %}"
    )
    chat = ChatTemplate(tmp_path)
    ids = chat.render([{"role": "user", "content": "a<|im_end|>b"}])
    assert chat.spell(ids) == '"a<|im_end|>b"<|end|>'
    end = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<|im_end|>")
    assert end not in ids


def test_a_template_that_writes_bos_gives_one(template: Callable[..., ChatTemplate]) -> None:
    """Oracle: bos counted, with a tokenizer that adds one; a template without it has none."""
    for name, count in {"headers": 1, "chatml": 1, "marked": 0, "channels": 0}.items():
        chat = template(name)
        (tokens,) = chat.encode(chat.examples(TWO_TURNS[:2], [1]))
        for ids in (tokens.ids.tolist(), chat.render(TWO_TURNS[:1], generation_prompt=True)):
            assert chat.spell(ids).count("<s>") == count == ids.count(0)
            assert chat.spell(ids).startswith("<s>") == (count == 1)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ["<|im_end|>", "</s>"]),
        ("channels", ["<|return|>", "</s>"]),
        ("after_last", ["<|end|>", "</s>"]),
        ("no_end", ["<|user|>", "</s>"]),
    ],
)
def test_tokens_that_end_a_turn(
    template: Callable[..., ChatTemplate], name: str, stops: list[str]
) -> None:
    """Oracle: what the template writes after an answer, then eos; `decode` ends there."""
    chat = template(name)
    assert [chat.spell([stop]) for stop in chat.stops] == stops
    (first, *_) = chat.encode(chat.examples(TWO_TURNS, [1, 3]))
    start = int(first.trained.argmax())
    assert chat.decode(first.ids[start:].tolist()).endswith("It is 4.")


CONTENT = st.text(
    st.sampled_from("ab .\n4é🙂江") | st.characters(exclude_categories=["Cs", "Cn"]), max_size=12
) | st.sampled_from(["<|im_end|>", "a<|im_end|>b", "<|im_start|>assistant\n", "</think>", "<s>"])


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), data=st.data())
def test_the_trained_text_is_the_answers(
    template: Callable[..., ChatTemplate], turns: list[tuple[str, str]], data: st.DataObject
) -> None:
    """Oracle: the answers, each with its end; as many ends as turns."""
    chat = template(data.draw(st.sampled_from(["chatml", "marked"])))
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    answers = [1 + 2 * number for number in range(len(turns))]
    chosen = data.draw(st.lists(st.sampled_from(answers), min_size=1, unique=True))
    (tokens,) = chat.encode(chat.examples(messages, chosen))
    text = chat.spell(tokens.ids[tokens.trained])
    assert text == "".join(f"{messages[n]['content']}<|im_end|>" for n in sorted(chosen))
    assert (tokens.ids == chat.stops[0]).sum() == max(chosen) + 1


def test_an_answer_that_the_prompt_does_not_begin_is_refused(
    template: Callable[..., ChatTemplate],
) -> None:
    """Oracle: the end of the prompt in the message."""
    with pytest.raises(Refused, match=r"message 2 does not begin as .*<\|assistant\|><think>\\n"):
        template("opens_thought").examples(TWO_TURNS, [1, 3])


def test_templates_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    """Oracle: key and file in the message, and the line of the template."""
    save_tokenizer(tmp_path, None)
    with pytest.raises(InputError, match="tokenizer.chat_template: .* has no chat template; set"):
        ChatTemplate(tmp_path)
    file = tmp_path / "chat_template.jinja"
    for text, needs in {
        "{{ bos_token }}\n{% for m in %}": "fails in line 2",
        "{{ messages[9].content.upper() }}": "fails",
        "{{ raise_exception('only poems') }}": "only poems",
        (chats.TEMPLATES / "pictures.jinja").read_text(): "does not write the content",
    }.items():
        file.write_text(text)
        with pytest.raises(
            InputError, match=f"^tokenizer.chat_template: {file}: .*{needs}"
        ) as error:
            ChatTemplate(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("reserved", [OPEN, BEGIN])
def test_texts_with_noncharacters_are_refused(
    template: Callable[..., ChatTemplate], reserved: str
) -> None:
    """Oracle: the character's name; they would be taken for marks of our own."""
    messages = [{"role": "user", "content": f"a{reserved}1"}]
    with pytest.raises(Refused, match=rf"U\+{ord(reserved):X}"):
        template("chatml").render(messages)


def test_the_configured_template_and_its_arguments_are_kept(tmp_path: Path) -> None:
    """Oracle: what transformers renders of the directory, with and without another value."""
    directory = save_tokenizer(tmp_path / "tokenizer", None, chat_template="{{ 'an old one' }}")
    write_template(directory, TokenizerSettings(path=directory))
    assert not (directory / "chat_template.jinja").exists()
    chosen = TokenizerSettings(
        path=directory,
        chat_template=chats.TEMPLATES / "drops_thoughts.jinja",
        template_arguments={"enable_thinking": False, "unused": 'a "b"', "number": 1.5},
    )
    write_template(directory, chosen)
    assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text())
    other, chat = AutoTokenizer.from_pretrained(directory), ChatTemplate(directory)
    ids = chat.render(TWO_TURNS[:1], generation_prompt=True)
    assert chat.spell(ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert ids == other.apply_chat_template(
        TWO_TURNS[:1], add_generation_prompt=True, return_dict=False
    )
    thinking = ChatTemplate(directory, {"enable_thinking": True})
    ids = thinking.render(TWO_TURNS[:1], generation_prompt=True)
    assert thinking.spell(ids).endswith("assistant\n")


def test_arguments_go_into_the_tokenizers_own_template(tmp_path: Path) -> None:
    """Oracle: the prompt with an empty thought."""
    text = (chats.TEMPLATES / "drops_thoughts.jinja").read_text()
    directory = save_tokenizer(tmp_path, None, chat_template=text)
    write_template(
        directory, TokenizerSettings(path=directory, template_arguments={"enable_thinking": False})
    )
    chat = ChatTemplate(directory)
    assert chat.spell(chat.render(TWO_TURNS[:1], generation_prompt=True)).endswith("</think>\n\n")


@pytest.mark.parametrize(
    "make", [chats.byte_level, chats.metaspace, chats.word_pieces, chats.unigram]
)
def test_special_tokens_that_the_vocabulary_lacks_are_added(tmp_path: Path, make: Any) -> None:
    """Oracle: transformers' reading of the files; the ids behind the tokenizer's last."""
    directory = save_tokenizer(tmp_path / "tokenizer", None, make)
    before = TextEncoder(directory)
    names = json.loads((directory / "tokenizer_config.json").read_text())
    names["added_tokens_decoder"] = {}  # as transformers 4 writes it
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ '<|turn|>' + messages[0].content + '<|stop|><|im_end|><|turn|>' }}")
    settings = TokenizerSettings(path=directory, chat_template=file)
    assert missing_tokens(directory, settings) == ["<|turn|>", "<|stop|>"]
    write_template(directory, settings)
    assert missing_tokens(directory, settings) == []
    new = [before.vocab_size, before.vocab_size + 1]
    after, other = TextEncoder(directory), AutoTokenizer.from_pretrained(directory)
    assert after.vocab_size == before.vocab_size + 2 and after.special == before.special | {*new}
    assert other.convert_tokens_to_ids(["<|turn|>", "<|stop|>"]) == new
    assert other.decode(new).replace(" ", "") == "<|turn|><|stop|>"
    assert other.decode(new, skip_special_tokens=True) == ""
    ids = other("a <|turn|>b", add_special_tokens=False).input_ids
    assert ids.count(new[0]) == 1
    for text in ("It is 4.", "thoughts\n"):
        assert list(after.encode_document(text)) == list(before.encode_document(text))


def test_a_tokenizer_whose_ids_have_gaps_is_refused(tmp_path: Path) -> None:
    """Oracle: the file and the tokens in the message; the id of the last token is raised by 5."""
    directory = save_tokenizer(tmp_path / "tokenizer", None)
    tree = json.loads((directory / "tokenizer.json").read_text())
    last = max(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    tree["model"]["vocab"][last] += 5
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ '<|turn|>' }}")
    with pytest.raises(InputError, match=r"^tokenizer.chat_template: .*json: the ids .*<\|turn\|>"):
        write_template(directory, TokenizerSettings(path=directory, chat_template=file))


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Oracle: the file in the message."""
    directory = save_tokenizer(tmp_path / "tokenizer", None)
    with pytest.raises(InputError, match="tokenizer.chat_template: there is no file .*other.jinja"):
        write_template(
            directory, TokenizerSettings(path=directory, chat_template=tmp_path / "other.jinja")
        )
