"""Prepared data: the same rows from every format, whole after kills, and mistakes in one line."""

import gzip
import json
import lzma
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.data.loader import IGNORED, Loader, document_bounds, evaluation_batches
from llmnorm.data.settings import DataSettings, TokenizerSettings
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.part import InputError
from tests.running import SMOKE, Child

TEXT = Path(__file__).parents[1] / "data" / "text" / "prose.jsonl"
CONTEXT = 32
TOKENIZER = TokenizerSettings(vocab_size=400)


def documents() -> list[str]:
    return [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]


def settings_for(tmp_path: Path, **source: object) -> DataSettings:
    one = {"name": "prose", **source}
    return DataSettings(sources=[one], context_length=CONTEXT, dir=tmp_path / "out", processes=1)


def prepared(tmp_path: Path, **source: object) -> packing.PackedData:
    return packing.prepare(settings_for(tmp_path, **source), TOKENIZER)


def rows_of(packed: packing.PackedData) -> dict[str, np.ndarray]:
    (batch,) = next(Loader(packed, seed=3, global_batch=packed.sources[0].rows).batches())
    held = [b["shift_labels"].numpy() for b in evaluation_batches(packed, 0, micro_batch=4)]
    return {k: v.numpy() for k, v in batch.items()} | {"held": np.concatenate(held)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, np.ndarray]:
    return rows_of(prepared(tmp_path_factory.mktemp("jsonl"), path=str(TEXT)))


def as_txt(folder: Path) -> dict[str, str]:
    for number, text in enumerate(documents()):
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8", newline="")
    return {"path": str(folder / "*.txt")}


def as_txt_gz(folder: Path) -> dict[str, str]:
    for number, text in enumerate(documents()):
        (folder / f"{number:05d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return {"path": str(folder / "*.txt.gz")}


def as_zst(folder: Path) -> dict[str, str]:
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(TEXT.read_bytes()))
    return {"path": str(folder / "a.jsonl.zst")}


def as_parquet(folder: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": documents()}), folder / "a.parquet", row_group_size=50)
    return {"path": str(folder / "a.parquet"), "text_field": "body"}


def as_saved_dataset(folder: Path) -> dict[str, str]:
    import datasets

    datasets.Dataset.from_dict({"text": documents()}).save_to_disk(folder / "saved")
    return {"dataset": str(folder / "saved")}


def as_streamed_dataset(folder: Path) -> dict[str, str]:
    (folder / "hub").mkdir()
    (folder / "hub" / "train.jsonl").write_bytes(TEXT.read_bytes())
    return {"dataset": str(folder / "hub")}


@pytest.mark.parametrize(
    "write", [as_txt, as_txt_gz, as_zst, as_parquet, as_saved_dataset, as_streamed_dataset]
)
def test_every_format_gives_the_same_rows(tmp_path, reference, write) -> None:
    # Oracle: the rows of the jsonl file.
    folder = tmp_path / "corpus"
    folder.mkdir()
    found = rows_of(prepared(tmp_path, **write(folder)))
    assert found.keys() == reference.keys()
    for name, values in reference.items():
        assert np.array_equal(found[name], values), name


def test_rows_are_the_documents_and_every_token_is_a_label_once(tmp_path) -> None:
    # Oracle: the documents encoded one by one, bos and eos around each.
    packed = prepared(tmp_path, path=str(TEXT))
    source, encoder = packed.sources[0], TextEncoder(packed.tokenizer_directory)
    loader = Loader(packed, seed=0, global_batch=source.rows)
    (batch,) = next(loader.batches())
    order = np.argsort(batch_index(packed, source.rows))
    inputs = batch["input_ids"].numpy()[order].reshape(-1)
    labels = batch["shift_labels"].numpy()[order].reshape(-1)
    positions = batch["position_ids"].numpy()[order]
    # One stream: the label of a position is the next input, unless that starts a document.
    starts = inputs == packed.bos
    assert np.array_equal(labels[:-1] == IGNORED, starts[1:])
    assert np.array_equal(labels[:-1][~starts[1:]], inputs[1:][~starts[1:]])
    # Positions count from 0 at every row and every document.
    for row, found in zip(inputs.reshape(positions.shape), positions, strict=True):
        expected, place = [], 0
        for token in row:
            place = 0 if token == packed.bos else place
            expected.append(place)
            place += 1
        assert found.tolist() == expected
    texts = [encoder.decode(np.array(part)) for part in pieces(inputs.tolist(), packed.bos)]
    whole = set(documents())
    assert texts[0] in whole and sum(text in whole for text in texts[:-1]) == len(texts) - 1


def batch_index(packed, rows: int) -> np.ndarray:
    from llmnorm.data.order import Order

    return Order([packed.sources[0].weight], [rows], 0).locate(0, rows)[1]


def pieces(tokens: list[int], bos: int) -> list[list[int]]:
    found: list[list[int]] = []
    for token in tokens:
        if token == bos:
            found.append([])
        else:
            found[-1].append(token)
    return [[t for t in piece if t > 2] for piece in found]


def test_validation_charges_every_token_and_knows_its_compressors(tmp_path) -> None:
    # Oracle: gzip and lzma themselves on the held-out documents; no document on both sides.
    packed = prepared(tmp_path, path=str(TEXT))
    source = packed.sources[0]
    batches = list(evaluation_batches(packed, 0, micro_batch=3))
    inputs = np.concatenate([b["input_ids"].numpy().reshape(-1) for b in batches])
    labels = np.concatenate([b["shift_labels"].numpy().reshape(-1) for b in batches])
    documents_held = source.validation_documents
    assert (labels != IGNORED).sum() == source.validation_tokens - documents_held
    encoder = TextEncoder(packed.tokenizer_directory)
    real = inputs[: source.validation_tokens].tolist()
    held = [encoder.decode(np.array(piece)) for piece in pieces(real, packed.bos)]
    raw = "".join(held).encode()
    assert len(raw) == source.validation_bytes >= 14_000
    assert set(held) <= set(documents())
    assert abs(len(gzip.compress(raw, 9)) - source.validation_gzip_bytes) < 64
    packer = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    assert abs(len(packer) - source.validation_xz_bytes) < 64


def test_bounds_of_documents_are_where_positions_restart(tmp_path) -> None:
    # Oracle: a loop over the tokens; rows of training, and of validation with its padding.
    packed = prepared(tmp_path, path=str(TEXT))
    batches = next(Loader(packed, seed=0, global_batch=8, micro_batch=4).batches())
    batches += evaluation_batches(packed, 0, micro_batch=5)
    for batch in batches:
        starts = [n for n, p in enumerate(batch["position_ids"].flatten().tolist()) if p == 0]
        expected = [*starts, batch["position_ids"].numel()]
        found = document_bounds(batch["position_ids"])
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert found.pop(name).equal(torch.tensor(expected, dtype=torch.int32))
        longest = max(b - a for a, b in zip(expected, expected[1:], strict=False))
        assert found == {"max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_and_micro_batches_cut_the_same_rows(tmp_path, world) -> None:
    # Oracle: one process, one micro batch.
    packed = prepared(tmp_path, path=str(TEXT))
    whole = Loader(packed, seed=5, global_batch=8).batches(16)
    parts = [
        Loader(packed, seed=5, global_batch=8, rank=r, world=world, micro_batch=2).batches(16)
        for r in range(world)
    ]
    for _ in range(3):
        (one,) = next(whole)
        many = [batch for part in parts for batch in next(part)]
        for name, values in one.items():
            joined = np.concatenate([batch[name].numpy() for batch in many])
            assert np.array_equal(values.numpy(), joined)


def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path, smoke_data) -> None:
    # Oracle: the directory of an uninterrupted preparation, byte for byte.
    words = ["data", str(SMOKE), f"data.dir={tmp_path / 'killed'}"]
    kills = 0
    for delay in np.linspace(0.05, 1.2, 12):
        child = Child(words, tmp_path / "log.txt")
        time.sleep(delay)
        if child.process.is_alive():
            os.kill(child.process.pid, signal.SIGKILL)
        kills += child.finish() == -signal.SIGKILL
    assert kills > 0
    last = Child(words, tmp_path / "log.txt")
    assert last.finish() == 0, last.log.read_text()
    config = load(SMOKE, [f"data.dir={smoke_data}"]).config
    packed = packing.find(config.data, config.tokenizer)
    assert packed is not None
    whole = packed.directory
    killed = tmp_path / "killed" / "packed" / whole.name
    for file in sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file()):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_prepared_data_is_found_and_changed_data_is_other_data(tmp_path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(TEXT.read_bytes())
    data = settings_for(tmp_path, path=str(folder / "*.jsonl"))
    assert packing.find(data, TOKENIZER) is None
    first = packing.prepare(data, TOKENIZER)
    found = packing.find(data, TOKENIZER)
    assert found is not None and found.identity == first.identity
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"text": "One more document."}\n')
    assert packing.find(data, TOKENIZER) is None
    assert packing.prepare(data, TOKENIZER).identity != first.identity


@settings(max_examples=60)
@given(text=st.text(max_size=200) | st.sampled_from(["<|bos|>", "a<|eos|>b", "\r\n\0", "\u0301e"]))
def test_text_comes_back_and_never_becomes_a_special_token(encoder, text) -> None:
    # Oracle: the text itself; the three special ids stand only at the ends.
    (block,) = encoder.encode([text or "x"], 1)
    tokens = block.tokens.tolist()
    assert encoder.decode(np.array(tokens[1:-1])) == (text or "x")
    assert not {0, 1, 2} & set(tokens[1:-1])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    packed = prepared(tmp_path_factory.mktemp("encoder"), path=str(TEXT))
    return TextEncoder(packed.tokenizer_directory)


def test_the_tokens_of_a_chat_template_are_trained_or_added(tmp_path: Path) -> None:
    """Oracle: ids by spelling; a trained tokenizer keeps its size, a copied one grows by two."""
    data = settings_for(tmp_path, path=str(TEXT))
    given = {"chat_template": "chatml"}
    trained = packing.prepare(data, TokenizerSettings(vocab_size=400, **given))
    assert (trained.vocab_size, trained.new_tokens) == (400, 0)
    plain = packing.prepare(data, TOKENIZER)
    path = plain.tokenizer_directory
    copied = packing.prepare(data, TokenizerSettings(path=path, **given))
    assert (copied.vocab_size, copied.new_tokens) == (402, 2)
    assert len({trained.identity, plain.identity, copied.identity}) == 3
    for packed, first in ((trained, 3), (copied, 400)):
        directory = packed.tokenizer_directory
        ids = Tokenizer.from_file(str(directory / "tokenizer.json"))
        assert (
            ids.token_to_id("<|im_start|>") == first and ids.token_to_id("<|im_end|>") == first + 1
        )
        encoder = TextEncoder(directory)
        assert {first, first + 1} <= encoder.special
        assert not {first, first + 1} & {*encoder.encode_document("<|im_end|>").tolist()}
    again = packing.find(data, TokenizerSettings(path=path, **given))
    assert again is not None and again.new_tokens == 2


def test_a_vocabulary_too_small_for_the_tokens_of_a_template_is_refused(tmp_path: Path) -> None:
    """Oracle: 256 bytes, 3 special tokens and 2 of the template."""
    data = settings_for(tmp_path, path=str(TEXT))
    with pytest.raises(InputError, match=r"tokenizer.vocab_size: 260 .* give at least 261"):
        packing.prepare(data, TokenizerSettings(vocab_size=260, chat_template="chatml"))
