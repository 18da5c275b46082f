"""A prompt begins with the token that began every document in training, once."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from llmnorm.data.tokenizer import TextEncoder
from llmnorm.generation.prompts import begin_with, beginning, open_tokenizer, prompt_tokens
from llmnorm.part import InputError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate(["<s>", "</s>", "<x>", *LETTERS])}
BOS, EOS, OTHER = 0, 1, 2


def template(single: str, pair: str) -> Any:
    special = [("<s>", BOS), ("</s>", EOS), ("<x>", OTHER)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


BYTES = processors.ByteLevel(trim_offsets=False)
PROCESSORS = {
    "none": None,
    "bytes": BYTES,  # GPT-2's
    "adds it": template("<s> $A", "<s> $A <s>:1 $B:1"),
    "adds an end": template("$A </s>", "$A </s> $B </s>"),
    "adds another": template("<x> $A", "<x> $A $B"),
    "bytes and template": processors.Sequence([BYTES, template("$A </s>", "$A $B")]),
    "bytes in sequence": processors.Sequence([BYTES]),
    "bert": processors.BertProcessing(("</s>", EOS), ("<x>", OTHER)),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"},
    "says no": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
    "gpt2": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "unk_token": "<x>"},
    "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "unk_token": "<x>"},  # names no bos token
}


def write(directory: Path, processor: Any, config: dict[str, Any]) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<x>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if processor is not None:
        tokenizer.post_processor = processor
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    whole = {"eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return directory


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_every_text_begins_with_the_first_token_of_documents(
    tmp_path: Path, processor: Any, config: dict[str, Any]
) -> None:
    """Oracle: the first token of `TextEncoder`'s documents, and the text's own tokens behind it."""
    directory = write(tmp_path / "t", processor, config)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    first = TextEncoder(directory).bos
    tokenizer = open_tokenizer(directory, first=first)
    text = tokenizer.encode("ab c", add_special_tokens=False)
    assert prompt_tokens(tokenizer, "ab c") == [first, *text]
    assert prompt_tokens(tokenizer, "") == [first]
    spelled = tokenizer.convert_ids_to_tokens(first)
    assert prompt_tokens(tokenizer, f"{spelled}ab c") == [first, *text]
    assert tokenizer.encode("ab c")[: 1 + len(text)] == [first, *text]
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before

    begin_with(directory, first)  # as an export does
    for opened in (AutoTokenizer.from_pretrained(directory), open_tokenizer(directory)):
        assert opened.encode("ab c")[: 1 + len(text)] == [first, *text]
        assert beginning(opened) == [first]
        assert opened.bos_token_id == first
    once = {p.name: p.read_bytes() for p in directory.iterdir()}
    begin_with(directory, first)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == once


def test_other_tokens_of_a_template_stay(tmp_path: Path) -> None:
    """Oracle: the end that the tokenizer itself puts behind a text."""
    directory = write(tmp_path / "t", PROCESSORS["adds an end"], CONFIGS["plain"])
    begin_with(directory, BOS)
    text = [VOCABULARY[letter] for letter in "ab"]
    assert AutoTokenizer.from_pretrained(directory).encode("ab") == [BOS, *text, EOS]


def test_a_token_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Oracle: an id beyond the vocabulary."""
    directory = write(tmp_path / "t", None, CONFIGS["plain"])
    with pytest.raises(InputError, match="has no token of id 9999"):
        open_tokenizer(directory, first=9999)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer_config.json", "[]", "expected a JSON object, got a list"),
        ("tokenizer_config.json", "[" * 100_000, "nested deeper"),
        ("tokenizer.json", "{}", "no tokenizer can be read"),
        ("tokenizer.json", "\x00", "no tokenizer can be read"),
        ("special_tokens_map.json", "3", "expected a JSON object, got a number"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(
    tmp_path: Path, name: str, content: str, what: str
) -> None:
    """Oracle: the file, and what is wrong with it."""
    directory = write(tmp_path / "t", None, CONFIGS["plain"])
    (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=what) as caught:
        open_tokenizer(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a module that would leave a file, and an input that would fail."""
    config = {"tokenizer_class": "EvilTokenizer"}
    config |= {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}  # type: ignore[dict-item]
    directory = write(tmp_path / "t", None, config)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody asked"))
    with pytest.raises(InputError, match="auto_map names Python code, which is not run"):
        open_tokenizer(directory)
    assert not (tmp_path / "ran").exists()
