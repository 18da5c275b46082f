"""A row's text as its tokens come: the pieces joined are the tokens decoded at once."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmnorm.generation.text import TextStream
from llmnorm.part import InputError
from tests.generation.test_prompts import LETTERS

SPECIAL = ["<s>", "</s>", "<x>"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ALPHABET = {chr(byte): token for byte, token in zip(range(256), LETTERS, strict=False)}


def _byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, and words that begin with a space."""
    made = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *LETTERS])}, merges=[])
    )
    made.add_special_tokens(SPECIAL)
    made.add_tokens([" the", "end", "\nUser:"])
    made.pre_tokenizer, made.decoder = BYTES, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def _metaspace(byte_tokens: bool) -> PreTrainedTokenizerFast:
    """Words that begin with a space, as SentencePiece writes them."""
    words = ["▁a", "▁the", "▁", "e", "nd", "▁end", ".", "\n", "User", ":", "ü", "▁日", "本", "🙂"]
    byte = [f"<0x{b:02X}>" for b in range(256)] if byte_tokens else []
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *byte, *words])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=byte_tokens))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    if byte_tokens:  # Llama 2's
        strip = decoders.Strip(content=" ", left=1, right=0)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        made.decoder = decoders.Sequence(steps)
    else:
        made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def _wordpiece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", *SPECIAL, "the", "##s", "end", "##ing", ".", "'", "user"]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(words)}, unk_token="[UNK]"))
    made.add_special_tokens(SPECIAL)
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="[UNK]")


TOKENIZERS = {
    "byte level": _byte_level(),
    "metaspace": _metaspace(False),
    "byte tokens": _metaspace(True),
    "wordpiece": _wordpiece(),
}
SOUND = [name for name in TOKENIZERS if name != "byte tokens"]


def whole(tokenizer: PreTrainedTokenizerFast, ids: list[int], skip: bool = True) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def ids_of(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=70, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_text_decoded_at_once(
    name: str, data: st.DataObject, skip: bool
) -> None:
    """Oracle: the tokenizer's own decoding of all tokens; most random bytes are no UTF-8."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(ids_of(tokenizer))
    stream = TextStream(tokenizer, skip_special=skip)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == whole(tokenizer, ids, skip)
    assert not stream.stopped


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=st.text("a the.\nUser:ü日本🙂éß€𝄞", max_size=20))
@example(text="日本🙂🙂 é𝄞")
def test_whole_characters_come_at_their_last_token(name: str, text: str) -> None:
    """Oracle: no piece of a text's own tokens has a replaced character, and none is late."""
    tokenizer = TOKENIZERS[name]
    if name == "wordpiece":
        text = "the end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, told = TextStream(tokenizer), ""
    for count, token in enumerate(ids, 1):
        piece = stream.push(token)
        assert "\ufffd" not in piece
        told += piece
        now = whole(tokenizer, ids[:count])
        assert told == now.rstrip("\ufffd") or "\ufffd" in now
    assert told == whole(tokenizer, ids)
    assert stream.finish() == ""


STOPS = st.lists(
    st.sampled_from(["\nUser:", "end", "the", " ", "ü", ":\n", "aa", "e", "ende", "🙂", "nd e"]),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), stops=STOPS)
def test_a_stop_ends_the_text_where_it_begins(
    name: str, data: st.DataObject, stops: list[str]
) -> None:
    """Oracle: the shortest run of tokens whose text holds a stop, cut before the first one."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(ids_of(tokenizer))
    stream, told, used = TextStream(tokenizer, stops), "", 0
    for token in ids:
        told += stream.push(token)
        used += 1
        if stream.stopped:
            break
    text = whole(tokenizer, ids[:used])
    if stream.stopped:
        assert told == text[: min(text.find(stop) for stop in stops if stop in text)]
        assert not any(stop in whole(tokenizer, ids[: used - 1]) for stop in stops)
        assert stream.push(5) == "" and stream.finish() == ""
    else:
        last = stream.finish()
        cuts = [text.find(stop) for stop in stops if stop in text]
        assert told + last == text[: min(cuts, default=None)] if cuts else told + last == text


def test_text_is_held_only_as_long_as_it_may_be_a_stop() -> None:
    """Oracle: worked by hand."""
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, ["\nUser:", "ser!"])
    pieces = [stream.push(token) for token in tokenizer.encode("a\nUsers\nUser: b")]
    assert pieces[:2] == ["a", ""]
    assert "".join(pieces) == "a\nUsers"
    assert stream.stopped
    assert [len(piece) for piece in pieces] == [1, 0, 0, 0, 0, 0, 5, 1, 0, 0]


def test_a_long_run_of_broken_bytes_is_told_as_it_comes() -> None:
    """Oracle: at most three characters are held back, and a push decodes few tokens."""
    tokenizer = TOKENIZERS["byte level"]
    broken = tokenizer.convert_tokens_to_ids("ÿ")  # the byte FF
    stream, told = TextStream(tokenizer), ""
    for count in range(1, 30):
        told += stream.push(broken)
        assert len(told) >= count - 3
    assert told + stream.finish() == "\ufffd" * 29


def test_a_broken_byte_does_not_take_back_a_character_before_it() -> None:
    """Oracle: worked by hand; decoded at once, the whole run of byte tokens is replaced."""
    tokenizer = TOKENIZERS["byte tokens"]
    run = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "é".encode()]
    ids = [*run, tokenizer.convert_tokens_to_ids("<0xFF>"), tokenizer.convert_tokens_to_ids("▁a")]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == "é\ufffd a"
    assert whole(tokenizer, ids) == "\ufffd\ufffd\ufffd a"


def test_an_empty_stop_is_refused() -> None:
    """Oracle: the message."""
    with pytest.raises(InputError, match="^stop: one of the texts is empty"):
        TextStream(TOKENIZERS["metaspace"], ["a", ""])


def test_a_window_of_the_last_tokens_is_decoded() -> None:
    """Oracle: however long the text is, the tokenizer is given a few tokens at a time."""
    tokenizer = TOKENIZERS["byte level"]
    stream, counted = TextStream(tokenizer), []
    decoded = stream._decoded
    stream._decoded = lambda ids: counted.append(len(ids)) or decoded(ids)  # type: ignore
    for token in itertools.islice(itertools.cycle(tokenizer.encode("the end é")), 200):
        stream.push(token)
    assert max(counted) <= 6


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_text_goes_on_from_the_tokens_before_it(name: str, data: st.DataObject) -> None:
    """Oracle: all tokens decoded at once; a word after another one keeps its space."""
    tokenizer = TOKENIZERS[name]
    before, ids = data.draw(ids_of(tokenizer)), data.draw(ids_of(tokenizer))
    head = whole(tokenizer, before)
    stream = TextStream(tokenizer, before=before)
    pieces = [stream.push(token) for token in ids]
    text = "".join([*pieces, stream.finish()])
    if head and not head.endswith("\ufffd"):
        assert head + text == whole(tokenizer, [*before, *ids])
    if name == "metaspace":
        the = tokenizer.convert_tokens_to_ids("▁the")
        assert TextStream(tokenizer, before=[the]).push(the) == " the"
        assert TextStream(tokenizer).push(the) == "the"
