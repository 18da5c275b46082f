"""Corpora, prepared data and exports at addresses of a store, against a real S3 server."""

import json
from pathlib import Path

import pytest
from torch import equal
from transformers import AutoModelForCausalLM

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.data.files import MissingInput
from llmnorm.data.settings import TrainedOn
from llmnorm.part import InputError
from llmnorm.remote.objects import open_store
from tests.remote.served import Line
from tests.running import ROOT, SMOKE, llmnorm

TEXTS = ROOT / "tests" / "data" / "text"


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def corpus(address: str) -> list[str]:
    """The smoke corpus' settings, its texts in the store; one text is there in two files."""
    store = open_store(address, "test")
    lines = (TEXTS / "prose.jsonl").read_bytes().splitlines(keepends=True)
    store.write("text/prose/b.jsonl", b"".join(lines[100:]))
    store.write("text/prose/a.jsonl", b"".join(lines[:100]))
    (notes,) = TEXTS.glob("notes.*")
    store.send(notes, f"text/{notes.name}")
    return [
        f"data.sources.0.path={address}/text/prose/*.jsonl",
        f"data.sources.1.path={address}/text/{notes.name}",
    ]


def test_a_corpus_in_a_store_becomes_the_same_tokens(
    address: str, line: Line, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the tokens of the same texts on this machine; what is fetched is fetched once."""
    settings = corpus(address)
    config = load(SMOKE, [*settings, f"data.dir={tmp_path / 'data'}"]).config
    got = packing.prepare(config.data, config.tokenizer)
    of_files = load(SMOKE, [f"data.dir={smoke_data}"]).config
    wanted = packing.prepare(of_files.data, of_files.tokenizer)
    assert [(s.rows, s.documents, s.tokens) for s in got.sources] == [
        (s.rows, s.documents, s.tokens) for s in wanted.sources
    ]
    for name in ("prose/train-00000.tokens.npy", "notes/validation-00000.tokens.npy"):
        assert (got.directory / name).read_bytes() == (wanted.directory / name).read_bytes()
    received = line.received
    assert packing.find(config.data, config.tokenizer) is not None
    assert line.received - received < 20_000  # the answers what is there, not the texts
    line.mode = "closed"  # a run that has its data goes on without the store
    of_run = TrainedOn(tmp_path, got.identity)
    kept = packing.ready(config.data, config.tokenizer, alone=True, command="", trained_on=of_run)
    assert kept.identity == got.identity
    with pytest.raises(MissingInput, match=r"data\.sources\.0\.path: s3://bucket: does not answer"):
        packing.find(config.data, config.tokenizer)
    line.mode = "open"
    store = open_store(address, "test")  # an object that is changed is another file
    store.write("text/prose/a.jsonl", store.read("text/prose/a.jsonl").replace(b"the", b"The"))
    assert packing.find(config.data, config.tokenizer) is None


def test_prepared_data_are_shared_through_a_store(address: str, tmp_path: Path) -> None:
    """Oracle: the files of the machine that prepared them; a damaged one is refused."""
    shared = f"data.dir={address}/data"
    first, second = (
        load(SMOKE, [shared, f"data.local={tmp_path / name}"]).config for name in ("one", "two")
    )
    made = packing.prepare(first.data, first.tokenizer)
    found = packing.find(second.data, second.tokenizer)
    assert found is not None and found.identity == made.identity
    assert found.directory.is_relative_to(tmp_path / "two")
    for file in made.directory.rglob("*"):
        if file.is_file():
            copy = found.directory / file.relative_to(made.directory)
            assert copy.read_bytes() == file.read_bytes(), file
    (shard,) = found.directory.glob("prose/train-*.tokens.npy")
    name = f"packed/{made.identity}/prose/{shard.name}"
    store = open_store(f"{address}/data", "test")
    store.write(name, store.read(name)[:-1] + b"\1")
    third = load(SMOKE, [shared, f"data.local={tmp_path / 'three'}"]).config
    with pytest.raises(InputError, match=f"{name.removeprefix('packed/')} is damaged"):
        packing.find(third.data, third.tokenizer)
    (found.directory / "MANIFEST.json").unlink()  # cut off while it was fetched: only the rest
    assert packing.find(second.data, second.tokenizer) is not None


def test_an_export_goes_to_an_address(
    address: str, run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same export to a directory; transformers loads what is fetched."""
    llmnorm("export", run, f"{address}/exported")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{address}/exported: LlmNormForCausalLM, ") and "/tmp" not in printed
    store = open_store(f"{address}/exported", "test")
    files = {str(p.relative_to(exported)) for p in exported.rglob("*")}
    assert set(store.names()) == files - {"eval.json"}  # which other tests write there
    for name in store.names():
        store.fetch(name, tmp_path / "down" / name)
    ours = AutoModelForCausalLM.from_pretrained(exported)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "down")
    for (name, one), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert equal(one, other), name
    assert json.loads(store.read("config.json"))["model_type"] == "llmnorm"
    assert cli.main(["export", str(run), f"{address}/exported"]) == 2
    assert f"{address}/exported: is not empty" in capsys.readouterr().err


def test_nothing_in_the_store_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the key and the address in one line, and exit code 2."""
    words = ["data", str(SMOKE), f"data.sources.0.path={address}/*.jsonl"]
    assert cli.main(words) == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert f"data.sources.0.path: nothing in the store matches {address}/*.jsonl" in text
