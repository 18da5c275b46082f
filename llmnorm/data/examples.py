"""Labelled texts, on which a classification is trained and evaluated.

Formats of a file:

    .jsonl        an object a line
    .json         a list of objects, or an object a line
    .csv, .tsv    the first line names the fields; a .tsv has no quotes, as GLUE's have none

A text a becomes bos + a + eos. A pair a, b becomes bos + a + eos + b + eos with the token types 0
(up to the first eos) and 1. Examples that are too long lose tokens at the end, the longer text of a
pair first.

What would surprise: nothing is prepared beforehand. The files are read and tokenised when a run
begins, which takes seconds for GLUE's largest. Classes are text whatever the file holds (1 is
"1"), ordered as numbers if all of them are whole numbers, else alphabetically.
"""

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmnorm.config.shipped import locate
from llmnorm.data.files import digest, looked_in
from llmnorm.data.identity import hash_of
from llmnorm.data.records import half_a_pair
from llmnorm.data.run_data import RunData
from llmnorm.data.settings import TOKENIZER_FILES
from llmnorm.data.tokenizer import TextEncoder, check_special_tokens
from llmnorm.machine.reading import json_lines, parse_json, read_text
from llmnorm.part import InputError, nearest

KINDS = (".jsonl", ".json", ".csv", ".tsv")


class Fields(NamedTuple):
    """Names of a record's fields: the text, the second text (None: there is none), the label."""

    text: str
    pair: str | None
    label: str


class Table(NamedTuple):
    """A file's examples.

    Attributes:
        ids: each example's token ids.
        second: for each example, how many of its last tokens belong to the second text.
        labels: (examples,) class numbers, int64, or real numbers, float64.
        bytes: UTF-8 bytes of all texts.
    """

    ids: list[list[int]]
    second: list[int]
    labels: NDArray[Any]
    bytes: int


@dataclass(frozen=True)
class TrainingFile:
    """The training examples as a source; there is one."""

    rows: int
    documents: int
    tokens: int
    bytes: int
    name: str = "train"
    weight: int = 1


@dataclass(frozen=True, kw_only=True)
class Examples(RunData):
    """Training and validation examples; no chat template is used, so there are no new tokens."""

    sources: list[TrainingFile]
    classes: list[str]
    train: Table
    validation: Table


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
        fields: names of their records' fields.
        classes: the classes in their order; None: those of the training file.
        regression: labels are real numbers, and there are no classes.
        tokenizer: a Hugging Face tokenizer directory.
        context_length: the most tokens of an example.

    Raises:
        InputError: a file cannot be read, a record lacks a field, a label is not a class, or (with
            `regression`) not a number.
    """
    train, validation = locate(train, "objective.train"), locate(validation, "objective.validation")
    check_special_tokens(tokenizer, "tokenizer.path")
    encoder = TextEncoder(tokenizer)
    paths = {"objective.train": train, "objective.validation": validation}
    records = {key: list(_read(path, key, fields)) for key, path in paths.items()}
    if regression:
        classes = []
    elif classes is None:
        classes = _ordered({label for _, _, label, _ in records["objective.train"]})
        if len(classes) < 2:
            raise InputError(
                f"objective.train: {train} has one class only, '{classes[0]}' in "
                f"'{fields.label}'; a classification needs at least two"
            )
    tables = {
        key: _table(found, encoder, None if regression else classes, context_length)
        for key, found in records.items()
    }
    files = [
        train,
        validation,
        *(p for name in TOKENIZER_FILES if (p := tokenizer / name).is_file()),
    ]
    made = [[path.name, digest(path, "objective.train")] for path in files]
    trained = tables["objective.train"]
    count, tokens = len(trained.ids), sum(map(len, trained.ids))
    return Examples(
        sources=[TrainingFile(count, count, tokens, trained.bytes)],
        directory=train.parent,
        identity=hash_of([made, list(fields), classes]),
        tokenizer_directory=tokenizer,
        vocab_size=encoder.vocab_size,
        bos=encoder.bos,
        eos=encoder.eos,
        pad=encoder.pad,
        context_length=context_length,
        classes=classes,
        train=trained,
        validation=tables["objective.validation"],
    )


_Record = tuple[str, str | None, str, str]  # text, second text, label, "FILE: record N"


def _read(path: Path, key: str, fields: Fields) -> Iterator[_Record]:
    """The records of a file, checked."""
    if not os.path.lexists(path):
        raise InputError(f"{key}: there is no file {path}{looked_in(path)}")
    if path.suffix not in KINDS:
        raise InputError(f"{key}: {path} is not of a kind that is read; valid: {', '.join(KINDS)}")
    number = 0
    for number, record in enumerate(_records(path, key), 1):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: must be an object with the field '{fields.text}'")
        texts = [fields.text] if fields.pair is None else [fields.text, fields.pair]
        for name in (*texts, fields.label):
            if record.get(name) is None:
                known = [str(field) for field in record if field is not None]
                raise InputError(f"{where}: has no field '{name}'; {nearest(name, known)}")
        for name in texts:
            if not isinstance(record[name], str):
                raise InputError(f"{where}: the field '{name}' holds no text")
            if problem := half_a_pair(record[name]):
                raise InputError(f"{where}: {problem}")
        if isinstance(record[fields.label], dict | list):
            raise InputError(f"{where}: the field '{fields.label}' holds no label")
        pair = None if fields.pair is None else record[fields.pair]
        yield record[fields.text], pair, str(record[fields.label]).strip(), where
    if not number:
        raise InputError(f"{key}: {path} holds no examples")


def _records(path: Path, key: str) -> Iterator[Any]:
    if path.suffix in (".csv", ".tsv"):
        yield from _rows(path, read_text(path, key))
    elif path.suffix == ".json" and (text := read_text(path, key)).lstrip().startswith("["):
        yield from parse_json(text, f"{key}: {path}")
    else:
        for line in json_lines(path, key):
            if line.problem is None:
                yield line.value
            elif line.raw.strip(b" \t\r\n"):
                raise InputError(f"{path}:{line.number}: {line.problem.removeprefix('it: ')}")


def _rows(path: Path, text: str) -> Iterator[dict[str, str]]:
    """The rows of a .csv or .tsv file."""
    lines = io.StringIO(text, newline="")
    rows = (
        csv.DictReader(lines)
        if path.suffix == ".csv"
        else csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: cannot be read ({error})") from None


def _ordered(labels: set[str]) -> list[str]:
    """As numbers if all are whole numbers, else alphabetically."""
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
            raise InputError(
                f"{where}: the label '{label}' is not a class; {nearest(label, classes)}"
            )
    kind = np.float64 if classes is None else np.int64
    size = sum(len(t.encode()) for text, pair, *_ in records for t in (text, pair or ""))
    return Table(ids, counts, np.array(labels, kind), size)


def _number(label: str, where: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: the label '{label}' is not a number (objective.regression)")
    return value


def _cut(a: list[int], b: list[int] | None, context: int) -> tuple[list[int], list[int] | None]:
    """Both texts, cut at their ends to fit beside bos and eos; the longer one is cut first."""
    if b is None:
        return a[: max(0, context - 2)], None
    room = max(0, context - 3)
    excess = max(0, len(a) + len(b) - room)
    from_longer = min(excess, abs(len(a) - len(b)))  # until both are of one length
    from_both = excess - from_longer
    from_a, from_b = (from_longer, 0) if len(a) > len(b) else (0, from_longer)
    from_a, from_b = from_a + from_both // 2, from_b + (from_both + 1) // 2
    return a[: max(0, len(a) - from_a)], b[: max(0, len(b) - from_b)]
