"""Labelled texts: what a classification is trained and evaluated on.

A file is .jsonl (an object a line), .json (a list of objects, or the same), .csv or .tsv (the first
line names the fields; a .tsv has no quotes, as GLUE's have none). A text becomes bos + a + eos, a
pair bos + a + eos + b + eos with token types 0 and 1; what is too long loses tokens at the end, of
the longer text first.

What would surprise: nothing is prepared; the files are read and tokenised when they are opened,
which takes seconds for GLUE's largest. Classes are text whatever the file holds (1 is "1"), and
their order is that of numbers if all are whole numbers, else alphabetical.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmnorm.config.shipped import locate
from llmnorm.data import corpus
from llmnorm.data.identity import hash_of
from llmnorm.data.tokenizer import FILES, TextEncoder
from llmnorm.part import InputError, nearest

KINDS = (".jsonl", ".json", ".csv", ".tsv")


class Fields(NamedTuple):
    """Which fields of a record hold the text, the text beside it (None: none) and the label."""

    text: str
    pair: str | None
    label: str


class Table(NamedTuple):
    """A file's examples.

    Attributes:
        ids: token ids of each.
        second: how many of each's last tokens belong to its second text.
        labels: (examples,) class numbers, int64, or real numbers, float64.
        bytes: UTF-8 bytes of all texts.
    """

    ids: list[list[int]]
    second: list[int]
    labels: NDArray[Any]
    bytes: int


@dataclass(frozen=True)
class Examples:
    """Training and validation examples; the attributes of prepared data that a run asks for."""

    directory: Path
    identity: str
    tokenizer_directory: Path
    vocab_size: int
    bos: int
    eos: int
    pad: int
    context_length: int
    classes: list[str]
    train: Table
    validation: Table

    @property
    def rows(self) -> int:
        """Training examples."""
        return len(self.train.ids)

    def sizes(self) -> list[dict[str, Any]]:
        """What is kept with a checkpoint of the training file."""
        tokens = sum(map(len, self.train.ids))
        counts = {"rows": self.rows, "documents": self.rows, "tokens": tokens}
        return [{"name": "train", "weight": 1, **counts, "bytes": self.train.bytes}]


def open_examples(
    train: Path,
    validation: Path,
    fields: Fields,
    *,
    classes: list[str] | None,
    regression: bool,
    tokenizer: Path,
    context_length: int,
) -> Examples:
    """Read and tokenise both files.

    Args:
        train, validation: the files; `llmnorm:NAME` is one that the package brings.
        fields: of their records.
        classes: the classes in their order; those of the training file if None.
        regression: labels are real numbers, and there are no classes.
        tokenizer: a Hugging Face tokenizer directory.
        context_length: tokens of an example at most.

    Raises:
        InputError: a file cannot be read, a record lacks a field, a label is none of the classes or
            no number.
    """
    train, validation = (locate(path, key) for key, path in _named(train, validation))
    encoder = TextEncoder(tokenizer)
    records = {key: list(_read(path, key, fields)) for key, path in _named(train, validation)}
    if regression:
        classes = []
    elif classes is None:
        classes = _ordered({label for _, _, label, _ in records["objective.train"]})
        if len(classes) < 2:
            raise InputError(
                f"objective.train: {train} has one class only, '{classes[0]}' in "
                f"'{fields.label}'; a classification needs two"
            )
    tables = {
        key: _table(found, encoder, None if regression else classes, context_length)
        for key, found in records.items()
    }
    files = [train, validation, *(p for name in FILES if (p := tokenizer / name).is_file())]
    made = [[path.name, corpus.digest(path)] for path in files]
    return Examples(
        directory=train.parent,
        identity=hash_of([made, list(fields), classes]),
        tokenizer_directory=tokenizer,
        vocab_size=encoder.vocab_size,
        bos=encoder.bos,
        eos=encoder.eos,
        pad=encoder.pad,
        context_length=context_length,
        classes=classes,
        train=tables["objective.train"],
        validation=tables["objective.validation"],
    )


_Record = tuple[str, str | None, str, str]  # text, second text, label, where


def _named(train: Path, validation: Path) -> list[tuple[str, Path]]:
    return [("objective.train", train), ("objective.validation", validation)]


def _read(path: Path, key: str, fields: Fields) -> Iterator[_Record]:
    if not path.is_file():
        raise InputError(f"{key}: there is no file {path}")
    if path.suffix not in KINDS:
        raise InputError(f"{key}: {path} is of no kind that is read; valid: {', '.join(KINDS)}")
    number = 0
    try:
        for number, record in enumerate(_records(path), 1):
            where = f"{path}: record {number}"
            texts = [fields.text] if fields.pair is None else [fields.text, fields.pair]
            for name in (*texts, fields.label):
                if record.get(name) is None:
                    known = [str(one) for one in record if one is not None]
                    raise InputError(f"{where}: has no field '{name}'; {nearest(name, known)}")
            for name in texts:
                if not isinstance(record[name], str):
                    raise InputError(f"{where}: the field '{name}' holds no text")
            pair = None if fields.pair is None else record[fields.pair]
            yield record[fields.text], pair, str(record[fields.label]).strip(), where
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: record {number + 1}: no such record ({error})") from None
    if not number:
        raise InputError(f"{key}: {path} holds no examples")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
        elif path.suffix == ".tsv":
            yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            text = file.read()
            if path.suffix == ".json" and text.lstrip().startswith("["):
                yield from json.loads(text)
            else:
                yield from (json.loads(line) for line in text.splitlines() if line.strip())


def _ordered(labels: set[str]) -> list[str]:
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def _table(
    records: Sequence[_Record], encoder: TextEncoder, classes: list[str] | None, context: int
) -> Table:
    first = encoder.encode_alone([text for text, *_ in records])
    pairs = [pair for _, pair, *_ in records if pair is not None]
    second: Sequence[list[int] | None] = [None] * len(records)
    if pairs:
        second = encoder.encode_alone(pairs)
    ids, counts, labels = [], [], []
    numbers = {name: number for number, name in enumerate(classes or [])}
    for a, b, (_, _, label, where) in zip(first, second, records, strict=True):
        a, b = _cut(a, b, context)
        ids.append([encoder.bos, *a, encoder.eos, *([] if b is None else [*b, encoder.eos])])
        counts.append(0 if b is None else len(b) + 1)
        labels.append(_number(label, where) if classes is None else numbers.get(label, -1))
        if classes is not None and labels[-1] < 0:
            raise InputError(f"{where}: the label '{label}' is no class; {nearest(label, classes)}")
    kind = np.float64 if classes is None else np.int64
    size = sum(len(t.encode()) for text, pair, *_ in records for t in (text, pair or ""))
    return Table(ids, counts, np.array(labels, kind), size)


def _number(label: str, where: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: the label '{label}' is no number (objective.regression)")
    return value


def _cut(a: list[int], b: list[int] | None, context: int) -> tuple[list[int], list[int] | None]:
    """Both texts without what does not fit beside bos and eos, the longer cut first."""
    if b is None:
        return a[: max(0, context - 2)], None
    room = max(0, context - 3)
    excess = max(0, len(a) + len(b) - room)
    alone = min(excess, abs(len(a) - len(b)))
    rest = excess - alone
    of_a, of_b = (alone, 0) if len(a) > len(b) else (0, alone)
    of_a, of_b = of_a + rest // 2, of_b + (rest + 1) // 2
    return a[: max(0, len(a) - of_a)], b[: max(0, len(b) - of_b)]
