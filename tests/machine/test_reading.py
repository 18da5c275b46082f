"""The gate for files from outside: each kind of bad file becomes one line that names it."""

import os
import socket
from pathlib import Path

import pytest

from llmnorm.machine import reading
from llmnorm.machine.reading import json_lines, local_path, parse_json, read_object, read_text
from llmnorm.part import InputError, Settings


class Card(Settings):
    name: str
    bytes: int


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A fifo, a device, a socket, a directory, a link to itself and a missing file."""
    fifo, loop, listening = tmp_path / "fifo", tmp_path / "loop", tmp_path / "s"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
    for path, word in [
        (fifo, "named pipe"),
        (Path("/dev/zero"), "device"),
        (listening, "socket"),
        (tmp_path, "directory"),
        (loop, "leads back"),
        (tmp_path / "none", "no such file"),
        (tmp_path / ("n" * 300), "too long"),
    ]:
        with pytest.raises(InputError, match=word) as caught:
            read_text(path, "data.dir")
        assert str(caught.value).startswith(f"data.dir: {path}: ")
    with pytest.raises(InputError, match="NUL byte"):
        read_text(Path("a\0b"))


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    """The byte order mark is no text."""
    (tmp_path / "a").write_bytes("\ufeffläuft".encode())
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_text(tmp_path / "b") == "läuft"


def test_sizes_and_encodings_are_checked(tmp_path: Path) -> None:
    """More bytes than the limit, and bytes that are not UTF-8."""
    (tmp_path / "a").write_bytes(b"12345")
    assert read_text(tmp_path / "a", limit=5) == "12345"
    with pytest.raises(InputError, match="larger than 4 bytes"):
        read_text(tmp_path / "a", limit=4)
    (tmp_path / "a").write_bytes(b"12\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 200_000, "deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "deeper than 64"),
        ("1" * 5_000, "4,300 digits"),
        ("{'a': 1}", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_json_that_is_not_read(text: str, word: str) -> None:
    """Oracle: Python's own parser raises four kinds of exception for these, or accepts them."""
    with pytest.raises(InputError, match=word) as caught:
        parse_json(text, "a.json")
    assert str(caught.value).startswith("a.json: ") and "\n" not in str(caught.value)


def test_json_at_the_limit_is_read() -> None:
    """64 containers in each other, one fewer than is refused."""
    assert parse_json("[" * 64 + "]" * 64, "a.json")


def test_an_object_is_checked_by_its_class(tmp_path: Path) -> None:
    """A list, a missing key, an unknown key and a wrong type."""
    file = tmp_path / "card.json"
    file.write_text('{"name": "a", "bytes": 3}')
    assert reading.read_settings(file, Card) == Card(name="a", bytes=3)
    for text, word in [
        ("[1]", "expected a JSON object, got a list"),
        ('{"name": "a"}', "bytes: is required"),
        ('{"name": "a", "bytes": 3, "nam": 1}', "did you mean 'name'"),
        ('{"name": "a", "bytes": "3"}', "expected a number"),
        ('{"name": "a", "bytes": true}', "expected a number"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=word) as caught:
            reading.read_settings(file, Card)
        assert str(caught.value).startswith(f"{file}: ")
    file.write_text("null")
    with pytest.raises(InputError, match="got null"):
        read_object(file)


def test_lines_end_at_a_newline_alone(tmp_path: Path) -> None:
    """U+2028 and the other separators of `str.splitlines` stand inside of JSON strings."""
    file = tmp_path / "a.jsonl"
    text = "a\u2028b\u2029c\x85d\x1ce"
    lines = [f'{{"text": "{text[:-2]}"}}\n'.encode(), b"\x00\x00\n", b"[1, 2]\n", b'{"step": 4']
    file.write_bytes(b"".join(lines))
    found = list(json_lines(file))
    assert [line.raw for line in found] == lines
    assert found[0].value == {"text": text[:-2]} and found[0].problem is None
    assert [line.value for line in found[1:]] == [None] * 3
    assert "not JSON" in str(found[1].problem) and found[2].problem == "it is a list"
    assert [line.unfinished for line in found] == [False, False, False, True]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a line, lowered here."""
    monkeypatch.setattr(reading, "MAX_LINE", 10)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 11)
    with pytest.raises(InputError, match=r"a\.jsonl:2: the line is longer than 10 bytes"):
        list(json_lines(tmp_path / "a.jsonl"))


def test_a_typed_path_is_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home directory; object stores are refused by name."""
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/runs/a") == Path("/home/me/runs/a")
    assert local_path("a/b") == Path("a/b") and local_path("llmnorm:smoke.yaml")
    for text, word in [
        ("s3://bucket/run", "s3:// is not taken here"),
        ("a\0b", "NUL"),
        ("runs/" + "é" * 200, "more than 255 bytes"),
        ("~nobody-of-this-name/a", "no such user"),
    ]:
        with pytest.raises(ValueError, match=word):
            local_path(text)
