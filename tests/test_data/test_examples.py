"""Labelled files: every format gives the same examples; what is wrong is one line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from llmnorm.data.examples import Fields, open_examples
from llmnorm.data.tokenizer import TextEncoder, train
from llmnorm.part import InputError

RECORDS = [
    {"a": "One morning, Edda", "b": "found rope", "y": 2, "s": 0.5},
    {"a": 'a "quoted" word', "b": "two words", "y": 10, "s": -1.5},
    {"a": "the third", "b": "é and 漢", "y": 2, "s": 3.0},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train(["One morning, Edda found rope and two words"] * 3, 300, directory)
    return directory


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
            else:
                lines = [list(records[0]), *(list(r.values()) for r in records)]
                file.writelines("\t".join(map(str, line)) + "\n" for line in lines)
    return path


def opened(path: Path, tokenizer: Path, other: Path | None = None, **keys: Any) -> Any:
    settings: dict[str, Any] = {
        "classes": None,
        "regression": False,
        "context_length": 64,
        "fields": Fields("a", "b", "y"),
    }
    settings |= keys
    return open_examples(
        path, other or path, settings.pop("fields"), tokenizer=tokenizer, **settings
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_every_format_gives_the_same_examples(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    """Oracle: bos + a + eos + b + eos put together by hand; classes in the order of numbers."""
    found = opened(write(tmp_path / f"x.{kind}", RECORDS), tokenizer)
    encoder = TextEncoder(tokenizer)
    assert found.classes == ["2", "10"] and found.train.labels.tolist() == [0, 1, 0]
    for record, ids, second in zip(RECORDS, found.train.ids, found.train.second, strict=True):
        a, b = encoder.encode_alone([record["a"], record["b"]])
        assert ids == [encoder.bos, *a, encoder.eos, *b, encoder.eos]
        assert second == len(b) + 1
    assert found.rows == 3 and found.sizes()[0]["tokens"] == sum(map(len, found.train.ids))
    alone = opened(
        tmp_path / f"x.{kind}", tokenizer, fields=Fields("b", None, "s"), regression=True
    )
    assert alone.train.labels.tolist() == [0.5, -1.5, 3.0] and alone.classes == []
    (b,) = encoder.encode_alone(["two words"])
    assert alone.train.ids[1] == [encoder.bos, *b, encoder.eos] and alone.train.second == [0, 0, 0]
    assert alone.identity != found.identity


@pytest.mark.parametrize(
    ("letters", "context", "kept"),
    [
        ((20, 4), 15, (8, 4)),
        ((4, 20), 15, (4, 8)),
        ((20, 18), 13, (5, 5)),
        ((20, 19), 14, (6, 5)),
        ((3, 2), 8, (3, 2)),
        ((3, 2), 3, (0, 0)),
    ],
)
def test_what_is_too_long_is_cut_at_the_end_of_the_longer(
    tmp_path: Path, tokenizer: Path, letters: Any, context: int, kept: Any
) -> None:
    """Oracle: lengths by hand; the text alone is cut at its end too."""
    encoder = TextEncoder(tokenizer)
    texts = {"a": "q" * letters[0], "b": "z" * letters[1]}
    a, b = encoder.encode_alone(list(texts.values()))
    assert (len(a), len(b)) == letters, "a letter is no token here"
    path = write(tmp_path / "x.jsonl", [texts | {"y": y} for y in (0, 1)])
    ids = opened(path, tokenizer, context_length=context).train.ids[0]
    end = encoder.eos
    assert ids == [encoder.bos, *a[: kept[0]], end, *b[: kept[1]], end]
    alone = opened(path, tokenizer, context_length=context, fields=Fields("a", None, "y"))
    assert alone.train.ids[0] == [encoder.bos, *a[: context - 2], end]


@pytest.mark.parametrize(
    ("records", "keys", "message"),
    [
        ([{"a": "x", "y": 1}], {}, "x.jsonl: record 1: has no field 'b'; valid: a, y"),
        ([{"a": 3, "b": "x", "y": 1}], {}, "record 1: the field 'a' holds no text"),
        (RECORDS[:1], {}, "has one class only, '2' in 'y'"),
        (RECORDS, {"classes": ["2", "3"]}, "record 2: the label '10' is not a class; valid: 2, 3"),
        (
            [RECORDS[0] | {"y": "much"}],
            {"regression": True},
            r"the label 'much' is not a number \(objective.regression\)",
        ),
        ([], {}, "objective.train: .* holds no examples"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, tokenizer: Path, records: Any, keys: Any, message: str
) -> None:
    """Oracle: the message."""
    with pytest.raises(InputError, match=message) as error:
        opened(write(tmp_path / "x.jsonl", records), tokenizer, **keys)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path, tokenizer: Path) -> None:
    """Oracle: the messages."""
    good = write(tmp_path / "good.jsonl", RECORDS)
    with pytest.raises(InputError, match="objective.validation: there is no file"):
        opened(good, tokenizer, tmp_path / "none.jsonl")
    for name, content, message in (
        ("x.txt", b"", "not of a kind that is read"),
        ("x.jsonl", b'{"a": ', "x.jsonl:1: not JSON"),
        ("y.jsonl", b"[1]\n", "y.jsonl:1: it is a list"),
        ("x.csv", b"a,b,y\n\xff\xfe,1,2\n", "not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            opened(good, tokenizer, tmp_path / name)
