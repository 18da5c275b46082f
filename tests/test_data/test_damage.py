"""Prepared data that is damaged, moved or without its corpus: used if whole, else said."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llmnorm import cli
from llmnorm.data import packing, shards
from llmnorm.data.identity import hash_of, made_of
from llmnorm.data.loader import Loader, evaluation_batches
from llmnorm.data.manifest import signed
from llmnorm.data.settings import DataSettings, TokenizerSettings, TrainedOn
from llmnorm.part import InputError

TOKENIZER = TokenizerSettings(vocab_size=280)


def _settings(folder: Path) -> DataSettings:
    source = {"name": "s", "path": str(folder / "in" / "*.jsonl")}
    return DataSettings(sources=[source], context_length=16, dir=folder / "data", processes=1)


def _ready(folder: Path, trained_on: TrainedOn | None = None) -> packing.PackedData:
    return packing.ready(
        _settings(folder), TOKENIZER, alone=True, command="x", trained_on=trained_on
    )


def _rows(packed: packing.PackedData) -> list[np.ndarray]:
    (batch,) = next(Loader(packed, seed=3, global_batch=packed.rows).batches())
    held = [b["input_ids"].numpy() for b in evaluation_batches(packed, 0, micro_batch=4)]
    sizes = [packed.vocab_size, packed.bos, packed.sources[0].bytes, packed.sources[0].weight]
    return [batch["input_ids"].numpy(), batch["position_ids"].numpy(), *held, np.array(sizes)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 900)
    (tmp_path / "in").mkdir()
    draw = random.Random(1)
    lines = [f"{draw.random()} " + "the river and the stone " * 3 for _ in range(60)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "in" / "a.jsonl").write_text(text)
    packing.prepare(_settings(tmp_path), TOKENIZER)
    return tmp_path


def _files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted((folder / "data").rglob("*")) if p.is_file()}


def test_damaged_data_is_used_if_whole_and_else_said(folder: Path) -> None:
    """Oracle: the rows of whole data; 200 flips, cuts, zeros and deletions anywhere."""
    expected, before = _rows(_ready(folder)), _files(folder)
    damaged = [path for path in before if not path.name.endswith(".lock")]
    draw = random.Random(7)
    said = 0
    for _ in range(200):
        path = draw.choice(damaged)
        raw = bytearray(before[path])
        place = draw.randrange(len(raw))
        match draw.choice(["flip", "cut", "zero", "delete"]):
            case "flip":
                raw[place] ^= 1 << draw.randrange(8)
            case "cut":
                del raw[place:]
            case "zero":
                raw[place : place + 64] = bytes(len(raw[place : place + 64]))
            case _:
                path.unlink()
        if path.exists():
            path.write_bytes(raw)
        try:
            found = _rows(_ready(folder))
            assert len(found) == len(expected)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), path
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            said += 1
        after = _files(folder)
        assert all(after.get(p) == raw for p, raw in before.items() if p != path), path
        for other in after.keys() - before.keys():
            other.unlink()
        path.write_bytes(before[path])
    assert said > 50


def test_what_a_killed_call_left_half_written_is_no_file_of_the_tokenizer(folder: Path) -> None:
    """Oracle: the manifest of the data that was prepared without it."""
    (file,) = (folder / "data" / "packed").glob("*/MANIFEST.json")
    whole = file.read_bytes()
    file.unlink()
    (file.parent / "tokenizer" / "tokenizer_config.json.1.tmp").write_text("{")
    _ready(folder)
    assert file.read_bytes() == whole


def _forge(folder: Path, change: dict[str, object]) -> Path:
    """The manifest with other values and a right checksum."""
    (file,) = (folder / "data" / "packed").glob("*/MANIFEST.json")
    tree = json.loads(file.read_text())
    del tree["checksum"]
    file.write_text(json.dumps(signed({**tree, **change})))
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"sources": 3},
        {"sources": []},
        {"sources": [{"name": "../../x"}]},
        {"special": {"bos": 0, "eos": 1, "pad": 10**9}},
        {"vocab_size": None},
        {"made_of": {"format": 1}},
        {"tokenizer": {"../../../in/a.jsonl": [1, "x"]}},
    ],
)
def test_a_forged_manifest_is_one_line(folder: Path, change: dict[str, object]) -> None:
    """Oracle: the manifest's or file's name, and no advice to delete anything else."""
    file = _forge(folder, change)
    with pytest.raises(InputError) as caught:
        _ready(folder)
    message = str(caught.value)
    assert str(file.parent) in message and "\n" not in message
    assert re.findall(r"delete (\S+)", message) == [str(file.parent)]


def test_a_manifest_that_is_a_list_or_a_fifo_is_one_line(folder: Path) -> None:
    """Oracle: its name in one line, no wait for the fifo."""
    (file,) = (folder / "data" / "packed").glob("*/MANIFEST.json")
    file.write_text("[]")
    with pytest.raises(InputError, match="MANIFEST.json: is damaged"):
        _ready(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="MANIFEST.json: is damaged .*named pipe"):
        _ready(folder)


def test_tokens_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    """Oracle: the message, of a shard whose checksum is right."""
    (file,) = (folder / "data" / "packed").glob("*/MANIFEST.json")
    vocabulary = json.loads(file.read_text())["vocab_size"]
    _forge(folder, {"vocab_size": vocabulary - 10})
    with pytest.raises(InputError, match=r"train-0000\d.tokens.npy: the shard has a token beyond"):
        _rows(_ready(folder))


def test_no_file_of_a_shard_stays_open(folder: Path) -> None:
    """Oracle: the descriptors of this process, before and after all shards are read."""
    packed = _ready(folder)
    assert len(list((folder / "data").rglob("train-*.tokens.npy"))) > 2
    _rows(_ready(folder))  # imports
    before = len(os.listdir("/proc/self/fd"))
    _rows(packed)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupted_preparation_makes_damaged_shards_again(folder: Path) -> None:
    """Oracle: the files of an uninterrupted one."""
    before = _files(folder)
    (directory,) = (p.parent for p in before if p.name == "MANIFEST.json")
    (directory / "MANIFEST.json").unlink()
    (directory / "s" / "train-00001.tokens.npy").write_bytes(b"x")
    (directory / "s" / "train-00002.json").write_bytes(b"[]")
    packing.prepare(_settings(folder), TOKENIZER)
    assert _files(folder) == before


def test_a_run_goes_on_without_its_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the rows; without prepared data, or with other settings, the error."""
    packed = _ready(folder)
    expected, mine = _rows(packed), TrainedOn(Path("checkpoint"), packed.identity)
    (folder / "in").rename(folder / "away")
    found = _rows(_ready(folder, mine))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert f"going on with the prepared data {packed.identity}" in capsys.readouterr().err
    with pytest.raises(InputError, match="no file matches"):
        _ready(folder)
    other = _settings(folder).model_copy(update={"validation_bytes": 99})
    with pytest.raises(InputError, match="no file matches"):
        packing.ready(other, TOKENIZER, alone=True, command="x", trained_on=mine)
    shutil.rmtree(folder / "data" / "packed" / packed.identity)
    with pytest.raises(InputError, match="no file matches"):
        _ready(folder, mine)


def test_a_grown_corpus_is_refused_before_it_is_tokenised(folder: Path) -> None:
    """Oracle: the message, and no directory of the new identity; a touched file is no growth."""
    packed = _ready(folder)
    mine = TrainedOn(Path("checkpoint"), packed.identity)
    file = folder / "in" / "a.jsonl"
    os.utime(file, (1, 1))
    assert _ready(folder, mine).identity == packed.identity
    before = _files(folder)
    with file.open("a") as end:
        end.write('{"text": "more"}\n')
    with pytest.raises(
        InputError, match="^checkpoint: was trained on the data .* restore the corp"
    ):
        _ready(folder, mine)
    assert _files(folder) == before


def test_an_older_runs_data_is_prepared_by_its_rules(folder: Path) -> None:
    """Oracle: the identity of format 1, and that a new run gets the newest format's."""
    data = _settings(folder)
    assert isinstance(data.sources, list)
    more = (json.dumps({"text": f"{number} by the river " * 5}) for number in range(500))
    (folder / "in" / "b.jsonl").write_text("\n".join(more))
    old = hash_of(made_of(data, TOKENIZER, data.sources, 1))
    found = _ready(folder, TrainedOn(Path("checkpoint"), old))
    assert found.identity == old and _ready(folder).identity != old
    assert _ready(folder, TrainedOn(Path("checkpoint"), old)).identity == old


def test_the_command_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a line each for bad records, what is held out, long words, a small vocabulary."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    lines = [json.dumps({"text": f"{draw.random()} the river {'a' * 300}"}) for _ in range(200)]
    for name, end in (("a", ['{"text": null}', "{oops"]), ("b", [])):
        Path(f"{name}.jsonl").write_text("\n".join([*lines, *end]))
    sources = "[{name: a, path: a.jsonl, on_bad_record: skip}, {name: b, path: b.jsonl}]"
    Path("c.yaml").write_text(
        f"data: {{sources: {sources}, context_length: 16, validation_bytes: 9000}}\n"
        "tokenizer: {vocab_size: 9000}\nmodel: {hidden_size: 32, num_hidden_layers: 1, "
        "num_attention_heads: 2}\ntraining: {steps: 1}\n"
    )
    assert cli.main(["data", "c.yaml"]) == 0
    said = capsys.readouterr().err
    assert "a: 2 bad records are left out: a.jsonl:201: the field 'text'" in said
    assert re.search(r"a: \d.\d kB of 6\d.\d kB are held out", said)
    assert "400 words of more than 256 characters were cut" not in said  # held-out text is not read
    assert re.search(r"\d+ words of more than 256 characters were cut", said)
    assert re.search(r"the tokenizer has \d+ tokens, fewer than tokenizer.vocab_size 9000", said)
