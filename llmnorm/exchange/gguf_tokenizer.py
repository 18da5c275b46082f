"""A tokenizer as the fields of a .gguf file, in the two kinds of llama.cpp that we write.

    gpt2    byte-level BPE: tokens, merges, and the name of the rule that splits a text into words
    llama   SentencePiece's BPE: tokens with scores, bytes for what has no token

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp (the rules, by name) and
convert_hf_to_gguf.py (the fields).

What would surprise: llama.cpp's own script knows a tokenizer by the hash of what it makes of one
text, and refuses every other, so any that was trained here. Here the splitting rule itself is
compared with those that llama.cpp has; a tokenizer with another rule is refused. llama.cpp does not
normalise Unicode: text in decomposed form gets other tokens there than from a Qwen tokenizer.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict

from llmnorm.generation.prompts import beginning, open_tokenizer
from llmnorm.machine.reading import checked, read_object
from llmnorm.part import InputError, Settings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Rule(NamedTuple):
    """A rule of llmnorm's or a stock tokenizer, and its name in llama.cpp.

    Attributes:
        name: llama.cpp's.
        pattern: what a word is; None: GPT-2's, which the ByteLevel step has built in.
        whole_words: a word that is a token is not made of merges.
        normalizers: of Unicode, that llama.cpp leaves out too.
    """

    name: str
    pattern: str | None
    whole_words: bool
    normalizers: tuple[str, ...] = ()


RULES = (
    Rule("gpt-2", None, False),
    Rule("qwen2", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False, ("NFC",)),
    Rule("llama-bpe", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True),
)


class _Model(Settings):
    """The BPE of a tokenizer.json."""

    model_config = ConfigDict(extra="ignore")

    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    byte_fallback: bool = False
    ignore_merges: bool = False
    unk_token: str | None = None


class _Added(Settings):
    """A token that the text is searched for before anything else."""

    model_config = ConfigDict(extra="ignore")

    id: int
    content: str
    special: bool


class _File(Settings):
    """What is read of a tokenizer.json."""

    model_config = ConfigDict(extra="ignore")

    model: _Model
    added_tokens: list[_Added] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


class Fields(NamedTuple):
    """The tokenizer's part of a .gguf file.

    Attributes:
        kind: `gpt2` or `llama`.
        rule: llama.cpp's name of the splitting rule.
        tokens: their texts, by id; ids without a token have a text of their own.
        types: of the tokens, `NORMAL` to `BYTE`.
        scores: of the tokens, of kind `llama`: the higher is merged first; else empty.
        merges: of kind `gpt2`: "a b", in their order; else empty.
        begins: the texts begin with the bos token.
        space: a space is put before a text, of kind `llama`.
        unknown: the id of the unknown token.
        template: the chat template.
    """

    kind: str
    rule: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    begins: bool
    space: bool
    unknown: int | None
    template: str | None


def fields(directory: Path, *, rows: int, bos: int | None, first: int | None) -> Fields:
    """The fields of a tokenizer directory.

    Args:
        directory: the tokenizer.
        rows: of the model's embedding; ids from the tokenizer's last on are unused.
        bos: the token that the model's configuration says texts begin with.
        first: the token that began every document in training; None: as the tokenizer does.

    Raises:
        InputError: llama.cpp has no such tokenizer; the message says what differs.
    """
    where = directory / "tokenizer.json"
    tree = read_object(where)
    kind = tree["model"].get("type") if isinstance(tree.get("model"), dict) else None
    if kind != "BPE":
        raise InputError(f"{where}: is a {kind}; llama.cpp reads a BPE here; export a directory")
    file = checked(tree, _File, str(where))
    tokenizer = open_tokenizer(directory, first=first)
    begins = beginning(tokenizer)
    if begins not in ([], [bos]):
        raise InputError(
            f"{where}: begins texts with the tokens {begins}; llama.cpp can put the bos token "
            f"({bos}) before a text, or nothing; export a directory"
        )
    tokens, types = _tokens(file, rows, where)
    template = tokenizer.chat_template
    found = Fields(
        kind="gpt2",
        rule="default",
        tokens=tokens,
        types=types,
        scores=[],
        merges=[],
        begins=bool(begins),
        space=False,
        unknown=None,
        template=template if isinstance(template, str) else None,
    )
    if not file.model.byte_fallback:
        merges = [" ".join(pair) for pair in _pairs(file)]
        return found._replace(rule=_rule(file, where), merges=merges)
    ranks = {"".join(pair): -rank for rank, pair in reversed([*enumerate(_pairs(file))])}
    lowest = -(len(ranks) + 1)  # of single characters, which no merge makes
    return found._replace(
        kind="llama",
        scores=[float(ranks.get(token, lowest)) for token in tokens],
        space=_space_before(file, where),
        unknown=file.model.vocab.get(file.model.unk_token or ""),
    )


def _tokens(file: _File, rows: int, where: Path) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    known = {number: (text, NORMAL) for text, number in file.model.vocab.items()}
    if file.model.byte_fallback:
        for number, (text, _) in known.items():
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                known[number] = text, BYTE
            elif text == file.model.unk_token:
                known[number] = text, UNKNOWN
    for token in file.added_tokens:
        if known.get(token.id, ("", NORMAL))[1] != UNKNOWN:
            known[token.id] = token.content, CONTROL if token.special else USER_DEFINED
    if max(known) >= rows:
        raise InputError(
            f"{where}: has a token of id {max(known)}, and the model's embedding has {rows} rows"
        )
    pairs = [known.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text for text, _ in pairs], [kind for _, kind in pairs]


def _pairs(file: _File) -> list[tuple[str, str]]:
    """The merges; older files write a pair as one text with a space between."""
    pairs = []
    for merge in file.model.merges:
        left, _, right = (
            merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        )
        pairs.append((left, right))
    return pairs


def _rule(file: _File, where: Path) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits a text into words.

    Raises:
        InputError: it has none.
    """
    split = file.pre_tokenizer or {}
    steps = split.get("pretokenizers", []) if split.get("type") == "Sequence" else [split]
    pattern, plain = None, len(steps) in (1, 2) and all(isinstance(step, dict) for step in steps)
    if plain and len(steps) == 2:
        of = steps[0].get("pattern")
        pattern = of.get("Regex") if isinstance(of, dict) else None
        kept = {"type": "Split", "behavior": "Isolated", "invert": False}
        plain = pattern is not None and kept.items() <= steps[0].items()
    if plain:
        level = {"use_regex": True} | steps[-1]
        wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern is None}
        plain = wanted.items() <= level.items()
    normalizer = file.normalizer and file.normalizer.get("type")
    for rule in RULES:
        fits = rule.pattern == pattern and rule.whole_words == file.model.ignore_merges
        if plain and fits and (normalizer is None or normalizer in rule.normalizers):
            return rule.name
    names = ", ".join(rule.name for rule in RULES)
    raise InputError(
        f"{where}: splits text into words by a rule that is none of llama.cpp's {names} "
        "(pre_tokenizer, normalizer and ignore_merges together); export a directory"
    )


def _space_before(file: _File, where: Path) -> bool:
    """Whether a space is put before a text, of a SentencePiece tokenizer.

    Raises:
        InputError: it treats spaces in another way.
    """
    normalizer, split = file.normalizer, file.pre_tokenizer
    if normalizer is None and split is not None and split.get("type") == "Metaspace":
        if split.get("replacement") == "▁" and split.get("split", True) is False:
            return bool(split.get("prepend_scheme", "always") != "never")
    elif normalizer is not None and split is None:
        steps = normalizer.get("normalizers", [normalizer])
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        if steps == [{"type": "Prepend", "prepend": "▁"}, replace]:
            return True
        if steps == [replace]:
            return False
    raise InputError(
        f"{where}: treats spaces in another way than llama.cpp's SentencePiece; export a directory"
    )
