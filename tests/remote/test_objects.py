"""The verbs of a store, and what is said where it does not answer: against a real S3 server."""

import os
import time
from pathlib import Path

import pytest

from llmnorm.part import InputError
from llmnorm.remote.objects import Absent, StoreError, open_store
from tests.remote.served import Line


def test_what_goes_up_comes_down(address: str, tmp_path: Path) -> None:
    """Oracle: the bytes themselves; a file of three parts, since one of two is sent whole."""
    store = open_store(address, "run_dir")
    content = os.urandom(40 << 20)
    (tmp_path / "up").write_bytes(content)
    assert store.names() == {}
    store.send(tmp_path / "up", "a/large")
    store.write("a/small", b"12")
    store.write("b", b"")
    assert store.names() == {"a/large": 40 << 20, "a/small": 2, "b": 0}
    assert store.names("a") == {"a/large": 40 << 20, "a/small": 2}
    assert store.moved.bytes == 40 << 20
    store.fetch("a/large", tmp_path / "down" / "large")
    assert (tmp_path / "down" / "large").read_bytes() == content
    assert os.listdir(tmp_path / "down") == ["large"]
    store.remove(["a/small", "never there", "b"])
    assert store.names() == {"a/large": 40 << 20}


def test_a_name_that_begins_like_the_address_is_not_below_it(address: str) -> None:
    """Oracle: names by hand."""
    store, other = open_store(address, "run_dir"), open_store(f"{address}-2", "run_dir")
    other.write("x", b"1")
    assert store.names() == {} and other.names() == {"x": 1}
    store.write("x/y", b"1")
    assert store.names("x") == {"x/y": 1}


def test_only_one_creates_an_object(address: str) -> None:
    """Oracle: the content of the first."""
    store = open_store(address, "run_dir")
    assert store.create("lease", b"first") is True
    assert store.create("lease", b"second") is False
    assert store.read("lease") == b"first"


def test_what_is_not_there_is_said(address: str, tmp_path: Path) -> None:
    """Oracle: the kind of the error, and the names in its one line."""
    store = open_store(address, "run_dir")
    with pytest.raises(Absent, match="nothing"):
        store.read("nothing")
    with pytest.raises(Absent, match="nothing"):
        store.fetch("nothing", tmp_path / "file")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        store.send(tmp_path / "no file", "x")
    with pytest.raises(Absent, match=r"^s3://no-bucket/run: there is no bucket no-bucket$"):
        open_store("s3://no-bucket/run", "run_dir").names()
    with pytest.raises(InputError, match=r"^run_dir: fsspec knows no 'ss3://'.*you mean 's3'"):
        open_store("ss3://bucket/run", "run_dir")
    with pytest.raises(InputError, match=r"^run_dir: gs:// needs .*pip install gcsfs"):
        open_store("gs://bucket/run", "run_dir")


def test_a_connection_that_breaks_leaves_nothing_visible(
    address: str, line: Line, tmp_path: Path
) -> None:
    """Oracle: the store's own names after the line has come back, and the object's old content."""
    store = open_store(address, "run_dir")
    store.write("file", b"old")
    (tmp_path / "file").write_bytes(os.urandom(20 << 20))
    line.mode, line.after = "cut", line.sent + (5 << 20)
    with pytest.raises(StoreError, match=f"^{address}: does not answer"):
        store.send(tmp_path / "file", "file")
    with pytest.raises(StoreError, match=f"^{address}: does not answer"):
        store.names()
    line.mode = "open"
    assert store.names() == {"file": 3} and store.read("file") == b"old"
    line.mode = "slow"
    store.send(tmp_path / "file", "file")
    assert store.names() == {"file": 20 << 20}


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "both"])
def test_missing_credentials_are_one_line(
    address: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what the credentials are asked for, in one line."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    if missing == "both":
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    start = time.monotonic()
    with pytest.raises(StoreError) as found:
        open_store(address, "run_dir").names()
    text = str(found.value)
    assert "access was refused" in text and "are the credentials right" in text
    assert "\n" not in text and time.monotonic() - start < 120
