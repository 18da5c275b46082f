"""What comes in: only regular files, bounded memory, bad records refused or counted."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from llmnorm.data import corpus, records
from llmnorm.data.files import files
from llmnorm.data.records import BadRecords
from llmnorm.data.settings import SourceSettings
from llmnorm.part import InputError

KEY = "data.sources.0"


def read(path: Path | str, **source: str) -> list[str]:
    made = SourceSettings(name="s", path=str(path), **source)  # type: ignore[arg-type]
    return list(corpus.texts(made, KEY))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Oracle: key and file in the message, and no wait for a fifo."""
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl.gz").symlink_to("/dev/zero")
    (tmp_path / "d.parquet").symlink_to(tmp_path / "none")
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"):
        with pytest.raises(InputError, match=f"^{KEY}.path: .*{name}") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_of_that_name_wins_over_the_pattern(tmp_path: Path) -> None:
    """Oracle: the two files' texts."""
    (tmp_path / "part[12].txt").write_text("brackets")
    (tmp_path / "part1.txt").write_text("one")
    assert read(tmp_path / "part[12].txt") == ["brackets"]
    (tmp_path / "part[12].txt").unlink()
    assert read(tmp_path / "part[12].txt") == ["one"]


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    """Oracle: the link's name; a link to another directory is followed."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    assert read(tmp_path / "in" / "**" / "*.txt") == ["a"]
    for name in ("x", "y"):
        (tmp_path / "in" / "deep" / name).symlink_to(tmp_path / "in")
    with pytest.raises(InputError, match=f"{KEY}.path: .*/deep/x is a link that leads back"):
        read(tmp_path / "in" / "**" / "*.txt")


def test_a_relative_path_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the working directory in the message, of relative paths alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("none.txt", "*.txt"):
        with pytest.raises(InputError) as caught:
            files(name, KEY)
        assert f"(looked in {tmp_path}; paths are relative to it)" in str(caught.value)
    with pytest.raises(InputError) as caught:
        files(str(tmp_path / "none.txt"), KEY)
    assert "looked in" not in str(caught.value)


BAD = [
    b'{"text": null}',
    b'{"text": 3}',
    b'{"body": "x"}',
    b"[1]",
    b"{oops",
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": "a\0b"}',
    b'{"text": "x", "n": %s}' % (b"9" * 5000),
    b"[" * 100_000,
    b'{"text": "' + b"x" * 400 + b'"}',
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_record_is_refused_or_left_out(
    tmp_path: Path, bad: bytes, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: file:line in one line; the other records, and a count of one."""
    monkeypatch.setattr(records, "MAX_RECORD", 350 if len(bad) < 500 else 1 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    raw = b'\xef\xbb\xbf{"text": "first\\u2028line"}\r\n\n' + bad + b'\n{"text": "last"}'
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(pack(raw))
    with pytest.raises(InputError, match=rf"^{path}:3: .*; {KEY}.on_bad_record=skip") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    counted = BadRecords(KEY, skip=True)
    source = SourceSettings(name="s", path=str(path), on_bad_record="skip")
    assert list(corpus.texts(source, KEY, bad=counted)) == ["first\u2028line", "last"]
    assert counted.count == 1 and counted.first[0].startswith(f"{path}:3: ")


def test_zeros_and_endless_lines_are_noticed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the bytes that were taken from the stream, of 64 MB."""
    taken = 0
    real = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal taken
        block = real(self, size)
        taken += len(block)
        return block

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(1 << 26)))
    with pytest.raises(InputError, match=r"a.txt.gz: this is a binary file, not text"):
        read(tmp_path / "a.txt.gz")
    assert 0 < taken <= records.BLOCK
    monkeypatch.setattr(records, "MAX_DOCUMENT", 1 << 20)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a" * (1 << 24)))
    taken = 0
    with pytest.raises(InputError, match="has more than 1,048,576 bytes"):
        read(tmp_path / "b.txt.gz")
    assert 0 < taken <= 3 * records.BLOCK
    (tmp_path / "c.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        read(tmp_path / "c.txt")


def test_a_zst_of_zeros_is_decompressed_in_parts(tmp_path: Path) -> None:
    """Oracle: peak memory of the allocator that Python traces, for 512 MB of zeros."""
    import tracemalloc

    pack = zstandard.ZstdCompressor().compressobj()
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        for _ in range(512):
            file.write(pack.compress(bytes(1 << 20)))
        file.write(pack.flush())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="NUL"):
            read(tmp_path / "a.jsonl.zst")
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_a_damaged_file_is_one_line_even_where_records_are_skipped(
    tmp_path: Path, suffix: str
) -> None:
    """Oracle: key and file in the message."""
    path = tmp_path / f"a{suffix}"
    whole = json.dumps({"text": "words " * 999}).encode()
    raw = {".txt.gz": gzip.compress(whole), ".jsonl.zst": zstandard.compress(whole)}
    path.write_bytes(raw.get(suffix, b"PAR1" + whole)[:-5])
    with pytest.raises(InputError, match=f"^{KEY}.path: {path}: ") as caught:
        read(path, on_bad_record="skip")
    assert "\n" not in str(caught.value)


def test_a_table_with_one_text_that_is_not_utf_8(tmp_path: Path) -> None:
    """Oracle: the record's number; the other records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"one", b"\xff", None, b"four"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: record 2: not UTF-8 text \(byte 0\)"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", on_bad_record="skip") == ["one", "four"]
