"""Prepared conversations: examples, counts, what is held out, resumed, damaged and refused."""

import ast
import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmnorm.config.file import load
from llmnorm.data import shards
from llmnorm.data.conversations import ConversationData, Conversations
from llmnorm.data.example_blocks import Encoder
from llmnorm.data.identity import hash_of, made_of
from llmnorm.data.settings import DataSettings, TokenizerSettings, TrainedOn
from llmnorm.part import InputError
from tests.running import SMOKE, llmnorm, metrics_of
from tests.test_data import chats
from tests.test_data.chats import TWO_TURNS, save_tokenizer

Records = list[dict[str, Any]]


def write(path: Path, records: Records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chatter(count: int, seed: int = 0) -> Records:
    """Conversations of one to three turns, and some texts."""
    draw = random.Random(seed)
    found: Records = []
    for number in range(count):
        turns: Records = []
        for _ in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": f"{number} + {draw.random()}?"})
            turns.append({"role": "assistant", "content": f"It is {draw.random()}. é🙂"})
        found.append({"messages": turns} if number % 5 else {"text": f"{draw.random()} " * 30})
    return found


def settings(folder: Path, path: Path | str, context: int = 200, **source: Any) -> DataSettings:
    one = {"name": "s", "path": str(path), **source}
    return DataSettings(sources=[one], context_length=context, dir=folder / "data", processes=2)


def prepared(
    data: DataSettings,
    tokenizer: TokenizerSettings | Path,
    too_long: str = "truncate",
    **more: Any,
) -> Conversations:
    if isinstance(tokenizer, Path):
        tokenizer = TokenizerSettings(path=tokenizer)
    options = {"alone": True, "command": "llmnorm data x.yaml"} | more
    return ConversationData(data, tokenizer, too_long).ready(**options)


def texts(found: Conversations, stream: str = "train") -> list[tuple[str, str]]:
    """The text of each example, and of what is trained of it."""
    examples = getattr(found.sources[0], stream)
    made = []
    for index in range(len(examples)):
        ids, trained = examples.read(index)
        assert len(ids) == examples.sizes[index] <= found.context_length + 1
        assert trained[1:].any() and not trained[0]
        made.append((found.template.spell(ids), found.template.spell(ids[trained])))
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def as_gz(records: Records, folder: Path) -> dict[str, str]:
    path = write(folder / "a.jsonl", records)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return {"path": str(folder / "a.jsonl.gz")}


def as_table(suffix: str) -> Callable[[Records, Path], dict[str, str]]:
    def make(records: Records, folder: Path) -> dict[str, str]:
        import datasets

        # A table has the same fields in every record, and in every message.
        columns = ("messages", "text")
        table = datasets.Dataset.from_dict({c: [r.get(c) for r in records] for c in columns})
        if suffix == ".parquet":
            table.to_parquet(folder / "a.parquet", batch_size=7)
            return {"path": str(folder / "a.parquet")}
        table.save_to_disk(folder / "saved")
        return {"dataset": str(folder / "saved")}

    return make


@pytest.mark.parametrize("save", [as_gz, as_table(".parquet"), as_table("saved")])
def test_every_format_gives_the_same_examples(
    tmp_path: Path, tokenizer: Path, save: Callable[[Records, Path], dict[str, str]]
) -> None:
    """Oracle: the examples of the .jsonl file, in training and in validation."""
    records = chatter(60)
    records[3]["messages"][1]["weight"] = 0
    expected = prepared(settings(tmp_path, write(tmp_path / "a.jsonl", records)), tokenizer)
    folder = tmp_path / "other"
    folder.mkdir()
    data = settings(tmp_path, "x").model_dump()
    data["sources"] = [{"name": "s", **save(records, folder)}]
    found = prepared(DataSettings.model_validate(data), tokenizer)
    for stream in ("train", "validation"):
        assert texts(found, stream) == texts(expected, stream)
    assert found.identity != expected.identity


def test_examples_are_the_records(tmp_path: Path, tokenizer: Path) -> None:
    """Oracle: the answers and texts themselves; each record on one side, and all of it trained."""
    records = chatter(80)
    found = prepared(settings(tmp_path, write(tmp_path / "a.jsonl", records), 2000), tokenizer)
    expected = []
    for record in records:
        if "text" in record:
            expected.append(f"{record['text']}</s>")
        else:
            answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
            expected.append("".join(f"{answer}<|im_end|>" for answer in answers))
    train, held = ([trained for _, trained in texts(found, s)] for s in ("train", "validation"))
    assert sorted(train + held) == sorted(expected) and 0 < len(held) < 20
    assert [text for text in expected if text in train] == train  # the file's order
    source = found.sources[0]
    assert source.examples == len(train) == found.rows == source.weight
    assert source.tokens == int(source.train.sizes.sum())
    assert source.trained_tokens == sum(
        int(source.train.read(index)[1].sum()) for index in range(len(train))
    )
    assert sum(source.dropped.values()) == 0


def test_a_text_is_cut_into_rows_in_which_every_token_is_a_label_once(
    tmp_path: Path, tokenizer: Path
) -> None:
    """Oracle: the text's tokens by the tokenizer itself, with bos and eos around them."""
    from tokenizers import Tokenizer

    records = [{"text": f"{n} user assistant " * 40} for n in range(4)]
    found = prepared(settings(tmp_path, write(tmp_path / "a.jsonl", records), 16), tokenizer)
    alone = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    stream, index = found.sources[0].train, 0
    held = texts(found, "validation")[0][0]
    for record in records:
        if record["text"].startswith(held.removeprefix("<s>")[:2]):
            continue
        ids = [0, *alone.encode(record["text"], add_special_tokens=False).ids, 1]
        labels: list[int] = []
        while len(labels) < len(ids) - 1:
            row, trained = stream.read(index)
            start = len(labels)
            assert row.tolist() == ids[start : start + 17] and trained[1:].all()
            labels += row[1:].tolist()
            index += 1
        assert labels == ids[1:]
    assert index == len(stream)


def conversation_of(chat: Any, prompt: int, answer: int, seed: int) -> dict[str, Any]:
    """A conversation with `prompt` tokens before the answer and `answer` tokens in it."""

    def made(question: str, reply: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]

    draw = random.Random(seed)
    # Capital letters are no part of longer tokens of this vocabulary.
    fixed = len(chat.render(made("", "")[:1], generation_prompt=True))
    question = "".join(draw.choices("ABCDEF", k=prompt - fixed))
    messages = made(question, "".join(draw.choices("ABCDEF", k=answer - 1)))
    (tokens,) = chat.encode(chat.examples(messages, [1]))
    assert (len(tokens.ids), tokens.trained.sum()) == (prompt + answer, answer)
    return {"messages": messages}


def test_what_has_no_trained_token_left_is_dropped_and_counted(
    tmp_path: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the lengths, counted out: 60 + 10 tokens in a context of 48, beside shorter ones."""
    from llmnorm.data.chat import ChatTemplate

    chat = ChatTemplate(tokenizer)
    long = [conversation_of(chat, 60, 10, n) for n in range(3)]
    halves = [conversation_of(chat, 44, 10, 10 + n) for n in range(3)]
    short = [conversation_of(chat, 30, 10, 20 + n) for n in range(20)]
    validation = write(tmp_path / "v.jsonl", [conversation_of(chat, 30, 10, 99)])
    path = write(tmp_path / "a.jsonl", [*long, *halves, *short])
    data = settings(tmp_path, path, 48, validation=str(validation))
    source = prepared(data, tokenizer).sources[0]
    assert source.dropped["nothing trained left"] == 3 and source.dropped["too long"] == 0
    assert source.train.sizes.tolist() == [49] * 3 + [40] * 20
    counted = [int(source.train.read(index)[1].sum()) for index in range(23)]
    assert counted == [5] * 3 + [10] * 20
    said = "s: 26 records became 23 examples (3 truncated; 3 left out, nothing trained left)"
    assert said in capfd.readouterr().err

    source = prepared(data, tokenizer, "drop").sources[0]
    assert source.dropped["too long"] == 6 and source.dropped["nothing trained left"] == 0
    assert source.train.sizes.tolist() == [40] * 20
    said = "s: 26 records became 20 examples (6 left out, too long)"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_a_source_that_loses_all_is_refused(tmp_path: Path, tokenizer: Path, too_long: str) -> None:
    """Oracle: file and line of its first record, the key and the count in one line."""
    from llmnorm.data.chat import ChatTemplate

    chat = ChatTemplate(tokenizer)
    path = write(tmp_path / "a.jsonl", [conversation_of(chat, 60, 10, n) for n in range(5)])
    validation = write(tmp_path / "v.jsonl", [conversation_of(chat, 30, 10, 99)])
    data = settings(tmp_path, path, 48, validation=str(validation))
    with pytest.raises(InputError) as caught:
        prepared(data, tokenizer, too_long)
    message = str(caught.value)
    assert message.startswith(f"{path}:1: data.sources.0 (s): no example is left of the 5 records")
    assert "data.context_length 48" in message and "\n" not in message
    swapped = settings(tmp_path, validation, 48, validation=str(path))
    with pytest.raises(InputError, match=f"^{path}:1: .* of the 5 validation records"):
        prepared(swapped, tokenizer, too_long)


def test_the_end_of_an_answer_is_trained_where_pad_is_eos(tmp_path: Path) -> None:
    """Oracle: the last label of every example is the end, which is pad and eos too."""
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = save_tokenizer(tmp_path / "tokenizer", **names)
    path = write(tmp_path / "a.jsonl", [r for r in chatter(40) if "text" not in r])
    found = prepared(settings(tmp_path, path, 2000), tokenizer)
    assert found.pad == found.eos == found.template.stops[0]
    for index in range(found.rows):
        ids, trained = found.sources[0].train.read(index)
        assert ids[-1] == found.eos and trained[-1]


def test_each_answer_of_a_split_conversation_is_an_example(tmp_path: Path) -> None:
    """Oracle: the trained texts, written out, of a template that drops earlier thoughts."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "drops_thoughts")
    records: Records = [{"messages": TWO_TURNS}]
    validation = write(tmp_path / "v.jsonl", [{"messages": TWO_TURNS[:2]}])
    path = write(tmp_path / "a.jsonl", records)
    found = prepared(settings(tmp_path, path, validation=str(validation)), tokenizer)
    assert [trained for _, trained in texts(found)] == [
        "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
        "<think>\n\n</think>\n\n6<|im_end|>",
    ]
    prompt, reference = found.sources[0].validation.answer(0)
    assert reference == "<think>\n\n</think>\n\nIt is 4."
    assert prompt.tolist() == found.template.render(TWO_TURNS[:1], generation_prompt=True)


def test_answers_that_have_no_end_are_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the answers counted, one for each conversation; one line."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "no_end")
    path = write(tmp_path / "a.jsonl", [r for r in chatter(40) if "text" not in r])
    prepared(settings(tmp_path, path, 2000), tokenizer)
    said = [line for line in capfd.readouterr().err.splitlines() if "no token after" in line]
    assert said == [
        "data: the chat template writes no token after the last answer: 32 answers have no end to "
        "be trained"
    ]


def test_one_bos_and_no_end_that_a_message_spells_out(tmp_path: Path) -> None:
    """Oracle: bos and ends counted in the tokens; the tokenizer adds a bos by itself."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "headers")
    spelled = [
        {"role": "user", "content": "a<|eot_id|>b<s>"},
        {"role": "assistant", "content": "<|eot_id|>c"},
    ]
    validation = write(tmp_path / "v.jsonl", [{"messages": TWO_TURNS}])
    path = write(tmp_path / "a.jsonl", [{"messages": spelled}])
    found = prepared(settings(tmp_path, path, validation=str(validation)), tokenizer)
    ids, trained = found.sources[0].train.read(0)
    assert (ids == 0).sum() == 1 == (ids[0] == 0)
    assert (ids == found.template.stops[0]).sum() == 2
    assert found.template.spell(ids[trained]) == "<|eot_id|>c<|eot_id|>"


def test_an_answer_that_the_template_refuses_is_refused_or_left_out(tmp_path: Path) -> None:
    """Oracle: file and line; a count, where such records are left out and others are texts."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "opens_thought")
    records: Records = [{"text": f"{n} text " * 20} for n in range(30)]
    records[7] = {"messages": TWO_TURNS}
    path = write(tmp_path / "a.jsonl", records)
    validation = write(tmp_path / "v.jsonl", [{"text": "another text"}])
    data = settings(tmp_path, path, validation=str(validation))
    with pytest.raises(
        InputError, match=f"^{path}:8: message 2 does not begin .*on_bad_record=skip"
    ):
        prepared(data, tokenizer)
    data = settings(tmp_path, path, validation=str(validation), on_bad_record="skip")
    assert prepared(data, tokenizer).sources[0].dropped["refused by the template"] == 1


def test_bad_records_are_refused_or_counted(
    tmp_path: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: file and line of the first; the count, and the examples of the others."""
    records = [r for r in chatter(40) if "text" not in r]
    good = prepared(settings(tmp_path, write(tmp_path / "a.jsonl", records)), tokenizer)
    bad: Records = [{"messages": [TWO_TURNS[1]]}, {"dialogue": 1}, {"messages": TWO_TURNS[:1]}]
    path = write(tmp_path / "b.jsonl", [*records[:5], *bad, *records[5:]])
    with pytest.raises(InputError, match=f"^{path}:6: message 1: roles are out of order"):
        prepared(settings(tmp_path, path), tokenizer)
    found = prepared(settings(tmp_path, path, on_bad_record="skip"), tokenizer)
    assert texts(found) == texts(good)
    assert f"s: 3 bad records are left out: {path}:6: " in capfd.readouterr().err


def test_mistakes_of_the_configuration_are_one_line(tmp_path: Path, tokenizer: Path) -> None:
    """Oracle: key and cure."""
    path = write(tmp_path / "a.jsonl", chatter(30))
    data = settings(tmp_path, path)
    broken, bare = tmp_path / "broken.jinja", save_tokenizer(tmp_path / "bare", None)
    broken.write_text("{{ bos_token }}\n{% for message in messages %}")
    cases: dict[str, tuple[TokenizerSettings, dict[str, Any]]] = {
        "^tokenizer.path: conversations are prepared for a model that exists": (
            TokenizerSettings(),
            {},
        ),
        "^tokenizer.chat_template: there is no file .*none.jinja": (
            TokenizerSettings(path=tokenizer, chat_template=tmp_path / "none.jinja"),
            {},
        ),
        f"^tokenizer.chat_template: {bare} has no chat template; set tokenizer.chat_template": (
            TokenizerSettings(path=bare),
            {},
        ),
        f"^tokenizer.chat_template: {broken}: the chat template fails in line 2": (
            TokenizerSettings(path=bare, chat_template=broken),
            {},
        ),
        "^data: not prepared yet; run once, by itself: llmnorm data x.yaml": (
            TokenizerSettings(path=tokenizer),
            {"alone": False},
        ),
    }
    for message, (chosen, more) in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            prepared(data, chosen, **more)
        assert "\n" not in str(caught.value)
    empty = settings(tmp_path, write(tmp_path / "empty.jsonl", []))
    with pytest.raises(InputError, match=r"^data.sources.0 \(s\): the source has no text"):
        prepared(empty, tokenizer)


def test_what_decides_the_examples_is_in_the_identity(tmp_path: Path, tokenizer: Path) -> None:
    """Oracle: equal and unequal identities; prepared data is found without reading the files."""
    path = write(tmp_path / "a.jsonl", chatter(30))
    first = prepared(settings(tmp_path, path), tokenizer)
    found = {first.identity}
    template = chats.TEMPLATES / "after_last.jinja"
    plain = TokenizerSettings(path=tokenizer)
    arguments = plain.model_copy(update={"template_arguments": {"a": 1}})
    for data, chosen, too_long in (
        (settings(tmp_path, path, 201), plain, "truncate"),
        (settings(tmp_path, path), plain, "drop"),
        (settings(tmp_path, path), plain.model_copy(update={"chat_template": template}), "drop"),
        (settings(tmp_path, path), arguments, "truncate"),
        (settings(tmp_path, path, fields={"tools": "x"}), plain, "truncate"),
    ):
        found.add(prepared(data, chosen, too_long).identity)
    assert len(found) == 6
    again = prepared(settings(tmp_path, path, weight=3), tokenizer)
    assert again.identity == first.identity and again.sources[0].weight == 3


def test_plain_text_keeps_its_identity(tmp_path: Path) -> None:
    """Oracle: the identities that the smoke corpus had before conversations were read."""
    for words, identity in {
        (): "184ea4aecb8a7a62",
        ("tokenizer.mask=true",): "467b9e701d9f0d16",
    }.items():
        config = load(SMOKE, list(words)).config
        assert isinstance(config.data.sources, list)
        made = made_of(config.data, config.tokenizer, config.data.sources)
        assert hash_of(made) == identity


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the directory of an uninterrupted preparation, byte for byte; shards read once."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 900)
    monkeypatch.setattr("llmnorm.data.making_conversations.AT_ONCE", 300)
    records = chatter(60)
    records.insert(20, {"messages": [TWO_TURNS[0] | {"content": "long " * 99}, TWO_TURNS[1]]})
    path = write(tmp_path / "a.jsonl", records)
    whole = prepared(settings(tmp_path / "whole", path, 120), tokenizer)
    assert whole.sources[0].dropped["nothing trained left"] >= 1
    expected = _files(whole.directory)
    assert sum(name.startswith("s/train") for name in expected) > 20

    block, calls = Encoder.block, 0

    def failing(self: Encoder, found: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 9 == 0:
            raise KeyboardInterrupt
        return block(self, found)

    monkeypatch.setattr(Encoder, "block", failing)
    for _ in range(30):
        try:
            found = prepared(settings(tmp_path / "parts", path, 120), tokenizer)
            break
        except KeyboardInterrupt:
            continue
    assert _files(found.directory) == expected
    assert calls < 30 * 9


def test_damaged_shards_are_said(tmp_path: Path, tokenizer: Path) -> None:
    """Oracle: the examples of whole data; flips, cuts and deletions of every kind of file."""
    path = write(tmp_path / "a.jsonl", chatter(40))
    data = settings(tmp_path, path)
    whole = prepared(data, tokenizer)
    expected = texts(whole)
    draw = random.Random(3)
    for file in sorted((whole.directory / "s").glob("train-*.npy")):
        before = file.read_bytes()
        for _ in range(4):
            raw = bytearray(before)
            place = draw.randrange(len(raw))
            if draw.random() < 0.5:
                raw[place] ^= 1 << draw.randrange(8)
            else:
                del raw[place:]
            file.write_bytes(raw)
            with pytest.raises(InputError, match=f"{file}: the shard .*delete {whole.directory}"):
                texts(prepared(data, tokenizer))
        file.write_bytes(before)
    assert texts(prepared(data, tokenizer)) == expected
    manifest = whole.directory / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"tally": [', '"tally": [1, '))
    with pytest.raises(InputError, match="MANIFEST.json: is damaged"):
        prepared(data, tokenizer)


def test_a_run_goes_on_without_its_corpus(
    tmp_path: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same examples; other settings are refused."""
    own = tmp_path / "own"
    shutil.copytree(tokenizer, own)
    path = write(tmp_path / "a.jsonl", chatter(30))
    first = prepared(settings(tmp_path, path), own)
    run = TrainedOn(tmp_path / "run", first.identity)
    path.unlink()
    again = prepared(settings(tmp_path, path), own, trained_on=run)
    assert texts(again) == texts(first)
    assert "going on with the prepared data" in capfd.readouterr().err
    for data, too_long in (
        (settings(tmp_path, path), "drop"),
        (settings(tmp_path, path, 99), "truncate"),
    ):
        with pytest.raises(InputError, match="there is no file"):
            prepared(data, own, too_long, trained_on=run)


def test_a_record_is_trained_on_nowhere_if_it_is_held_out_anywhere(
    tmp_path: Path, tokenizer: Path
) -> None:
    """Oracle: no text on both sides, of two sources with common records."""
    records = [r for r in chatter(100) if "text" not in r]
    one = write(tmp_path / "a.jsonl", records[:60])
    two = write(tmp_path / "b.jsonl", records[30:])
    sources = [{"name": "one", "path": str(one)}, {"name": "two", "path": str(two)}]
    data = DataSettings(sources=sources, context_length=2000, dir=tmp_path / "data", processes=1)
    found = prepared(data, tokenizer)
    train, held = set(), set()
    for source in found.sources:
        for stream, into in ((source.train, train), (source.validation, held)):
            into |= {found.template.spell(stream.read(n)[0]) for n in range(len(stream))}
    assert held and not train & held
    assert found.mean({"one": 1.0, "two": 0.0}) == pytest.approx(
        found.sources[0].bytes / sum(source.bytes for source in found.sources)
    )
    assert [row["rows"] for row in found.sizes()] == [s.examples for s in found.sources]
    assert np.all(np.array([s.weight for s in found.sources]) > 0)


@pytest.fixture
def words(tmp_path: Path, tokenizer: Path) -> list[str]:
    """Settings of a run on conversations, beside those of the smoke configuration."""
    path = write(tmp_path / "a.jsonl", [{"messages": TWO_TURNS}, *chatter(40)])
    return [
        "objective=sft",
        f"data.sources=[{{name: chat, path: {path}}}]",
        "data.context_length=64",
        f"data.dir={tmp_path / 'data'}",
        f"tokenizer={{path: {tokenizer}, vocab_size: 32768}}",
        "schedule.warmup=0",
        "training.global_batch=8",
    ]


def test_the_command_prepares_counts_and_shows(
    tmp_path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the examples in the run's order; the table's numbers, counted."""
    from llmnorm.data.order import Order

    llmnorm("data", SMOKE, *words, "--show", "40", "--stats")
    printed, said = capfd.readouterr()
    config = load(SMOKE, words).config
    preparation = config.objective.preparation(config)
    assert preparation is not None
    found = preparation.find()
    (source,) = found.sources
    shown = printed.split("example ")[1:]
    assert len(shown) == 40
    _, order = Order([source.weight], [source.examples], config.data_seed).locate(0, 40)
    for number, index in enumerate(order.tolist()):
        ids, trained = source.train.read(index)
        head, *lines = shown[number].splitlines()
        assert head == f"{number}: source chat, {len(ids)} tokens, {int(trained.sum())} trained"
        lines = [line for line in lines if line.startswith("  ")]
        parts = [line.split(None, 1) for line in lines]
        assert "".join(ast.literal_eval(text) for _, text in parts) == found.template.spell(ids)
        texts_of = [ast.literal_eval(text) for use, text in parts if use == "trained"]
        assert "".join(texts_of) == found.template.spell(ids[trained])
    header, line, *rest = printed.split("source  ")[-1].splitlines()
    cells = dict(zip(header.replace("held out", "held_out").split(), line.split()[1:], strict=True))
    assert line.split()[0] == "chat"
    assert cells["examples"] == str(source.examples) == str(found.rows)
    assert cells["trained"] == f"{source.trained_tokens / source.tokens:.1%}"
    assert cells["dropped"] == str(sum(source.dropped.values()))
    assert int(cells["held_out"]) == len(source.validation)
    if sum(source.dropped.values()):
        assert rest[0].startswith("dropped: ") and rest[0].endswith("(chat)")
    assert "records became" in said


def test_a_run_trains_on_prepared_conversations_and_goes_on_without_them(
    tmp_path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: steps in metrics.jsonl; the template among the run's files; what doctor says."""
    run = tmp_path / "run"
    model = ["model.hidden_size=16", "model.num_hidden_layers=1", f"run_dir={run}"]
    llmnorm("train", SMOKE, *words, *model, "training.steps=2")
    assert (run / "tokenizer" / "chat_template.jinja").is_file()
    (tmp_path / "a.jsonl").unlink()
    llmnorm("train", run, "training.steps=3")
    losses = [line["loss"] for line in metrics_of(run) if "loss" in line]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    assert "going on with the prepared data" in capfd.readouterr().err
    llmnorm("doctor", run)
    assert "tokens)" in capfd.readouterr().out


def test_fields_of_conversations_are_refused_where_text_is_read(words: list[str]) -> None:
    """Oracle: the key and the cure."""
    source = "data.sources=[{name: s, path: a.jsonl, fields: sharegpt}]"
    for objective in ("causal_lm", "masked_lm"):
        more = [f"objective={objective}", "tokenizer.mask=true", source]
        if objective == "masked_lm":
            more += ["model.mixer=hydra"]
        with pytest.raises(
            InputError, match=r"data.sources.0.fields names .* choose objective sft"
        ):
            load(SMOKE, more)
