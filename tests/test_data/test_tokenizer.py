"""Long documents, long words, and special tokens that a tokenizer does not have."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmnorm.data import pieces
from llmnorm.data.tokenizer import LONGEST_WORD, TextEncoder, check_special_tokens, train
from llmnorm.part import InputError

WORDS = ["river", "stone", "light", "green", "under", "window", "paper", "morning", "seven"]
SPECIAL = ["<s>", "</s>", "[UNK]"]


def _corpus() -> list[str]:
    draw = random.Random(1)
    return [" ".join(draw.choice(WORDS) for _ in range(60)) + ".\n" for _ in range(200)]


def _bpe(split: str | None = None, vocabulary: int = 400) -> Tokenizer:
    made = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [byte] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), byte]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=alphabet,
        ),
    )
    return made


def _as_llama() -> Tokenizer:
    """A BPE over the whole text, which begins with a space that is put there."""
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
    )
    tree = json.loads(made.to_str())
    tree["pre_tokenizer"] = None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, space]
    tree["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps(tree))


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        _corpus(),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
    )
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        _corpus(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
        ),
    )
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _bpe,
    "three digits": lambda: _bpe(r"\d{1,3}|\s+|[^\s\d]+"),
    "across words": lambda: _bpe(r"\n", 900),
    "as Llama 2": _as_llama,
    "word pieces": _word_piece,
    "unigram": _unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def encoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TextEncoder:
    directory = tmp_path_factory.mktemp("kind")
    KINDS[request.param]().save(str(directory / "tokenizer.json"))
    names = '{"bos_token": "<s>", "eos_token": "</s>"}'
    (directory / "tokenizer_config.json").write_text(names)
    return TextEncoder(directory)


TEXT = st.lists(
    st.sampled_from([*(f"{word} " for word in WORDS), "\n", ". ", "1234567 ", "é ", "江石光绿下"])
    | st.sampled_from(["  ", "a\u0301 ", "🙂 ", "<s> ", "don't "]),
    min_size=100,
    max_size=250,
).map("".join)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3))
def test_a_long_document_has_its_own_tokens(encoder: TextEncoder, texts: list[str]) -> None:
    """Oracle: the encoding of the whole document; pieces of 300 characters, margins of 120."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 300)
        patch.setattr(pieces, "MARGIN", 120)
        patch.setattr(pieces, "BLOCK", 700)
        blocks = list(encoder.encode(texts, 2))
    found = np.concatenate([block.tokens for block in blocks]).tolist()
    whole = [[encoder.bos, *ids, encoder.eos] for ids in encoder.encode_alone(texts)]
    assert found == sum(whole, [])
    sizes = np.cumsum([0, *map(len, whole)])
    offsets = np.cumsum([0, *(len(block.tokens) for block in blocks)])
    pairs = list(zip(blocks, offsets, strict=False))
    assert np.concatenate([b.starts + o for b, o in pairs]).tolist() == sizes[:-1].tolist()
    assert np.concatenate([b.ends + o for b, o in pairs]).tolist() == sizes[1:].tolist()


@pytest.mark.parametrize("text", ["7" * 3000, " " * 3000, "江石光绿下" * 600, "a" * 3000])
def test_runs_without_a_place_to_cut(
    encoder: TextEncoder, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole document; where a whole is one unknown word, at least the end of it all."""
    monkeypatch.setattr(pieces, "PIECE", 400)
    monkeypatch.setattr(pieces, "MARGIN", 100)
    found = np.concatenate([block.tokens for block in encoder.encode([text], 1)]).tolist()
    (whole,) = encoder.encode_alone([text])
    if len(whole) > 10:
        assert found[1:-1] == whole
    else:
        assert set(found[1:-1]) == set(whole)
    assert (found[0], found[-1]) == (encoder.bos, encoder.eos)


def test_the_tokenizer_is_trained_on_words_of_bounded_length(tmp_path: Path) -> None:
    """Oracle: no token is longer than the longest word, the count of the words that were cut."""
    draw = random.Random(0)
    dna = "".join(draw.choice("ACGT") for _ in range(20_000))
    trained = train([dna, "a" * 2000, "two words, " * 99], 700, tmp_path)
    assert trained.cut_words == 2 and trained.vocab_size <= 700
    assert max(map(len, TextEncoder(tmp_path).spellings)) <= LONGEST_WORD
    few = train(["two words"], 700, tmp_path)
    assert few.cut_words == 0 and few.vocab_size < 300


def test_a_short_word_is_trained_on_whole(tmp_path: Path) -> None:
    """Oracle: the file that the rules of format 1, which cut no words, give."""
    train(_corpus(), 400, tmp_path / "new")
    train(_corpus(), 400, tmp_path / "old", format=1)
    names = ("tokenizer.json", "tokenizer_config.json")
    assert all(
        (tmp_path / "new" / n).read_bytes() == (tmp_path / "old" / n).read_bytes() for n in names
    )


@pytest.mark.parametrize("name", ["bos", "pad", "unk"])
def test_a_special_token_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    """Oracle: the message with the key, the token and the file that lacks it."""
    train(["some words"], 300, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    check_special_tokens(tmp_path, "tokenizer.path")
    names = json.loads(file.read_text()) | {f"{name}_token": {"content": "<none>"}}
    file.write_text(json.dumps(names))
    with pytest.raises(InputError, match=f"tokenizer.path: .*{name}_token '<none>' is not in"):
        check_special_tokens(tmp_path, "tokenizer.path")


@pytest.mark.parametrize("text", ["[]", '{"bos_token": 3}', "{", "\0"])
def test_a_spoilt_tokenizer_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    """Oracle: the file's name in one line."""
    train(["some words"], 300, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match="tokenizer_config.json") as caught:
        TextEncoder(tmp_path)
    assert "\n" not in str(caught.value)
