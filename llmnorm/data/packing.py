"""Tokens on disk: from the configured sources to packed rows.

A document becomes bos + tokens + eos; the documents of a source, one after the other, are its
stream. Row i is stream[i C : i C + C + 1] with C = `context_length`: rows of one source overlap by
one token, so every token but the stream's first is a label exactly once. Training rows are full;
the last validation row is padded, so that evaluation charges every token of the validation text.

`<data.dir>/packed/<identity>/` holds `tokenizer/`, a directory of shards for every source, and
`MANIFEST.json`, written last. Context length, weights and seed are not part of the identity: they
only say how the same tokens are read. `packed/found/` remembers the identity of input files by
path, size and time, so that `find` need not read them.
"""

import contextlib
import errno
import fcntl
import glob
import gzip
import io
import itertools
import json
import lzma
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmnorm.data import corpus, default_corpus, split
from llmnorm.data import tokenizer as tokenizers
from llmnorm.data.identity import hash_of, made_of, quick_key
from llmnorm.data.packed import PackedData, PackedSource, check_fills_a_row, open_packed
from llmnorm.data.settings import DataSettings, SourceSettings, TokenizerSettings, source_keys
from llmnorm.data.shards import ShardWriter
from llmnorm.part import InputError

__all__ = ["PackedData", "PackedSource", "find", "prepare"]


def find(data: DataSettings, tokenizer: TokenizerSettings) -> PackedData | None:
    """The prepared data of these settings, or None; no file of the corpus is read.

    Raises:
        InputError: a source's files are missing, or what was prepared is damaged.
    """
    sources = sources_of(data)
    if not sources:
        return None
    known = data.dir / "packed" / "found" / quick_key(data, tokenizer, sources)
    if not known.is_file():
        return None
    directory = data.dir / "packed" / known.read_text(encoding="utf-8").strip()
    if not (directory / "MANIFEST.json").is_file():
        return None
    return open_packed(directory, data.context_length, sources, contents=False)


def ready(
    data: DataSettings, tokenizer: TokenizerSettings, *, alone: bool, command: str
) -> PackedData:
    """The prepared data of these settings; what is missing is prepared by a process that is alone.

    Args:
        alone: whether this is the only process.
        command: what prepares the data, for the message.

    Raises:
        InputError: as `find` and `prepare`; or the data is missing and there are several processes.
    """
    packed = find(data, tokenizer)
    if packed is not None:
        return packed
    if not alone:
        raise InputError(f"data: not prepared yet; run once, by itself: {command}")
    return prepare(data, tokenizer)


def prepare(data: DataSettings, tokenizer: TokenizerSettings) -> PackedData:
    """Makes the data of these settings, or checks what is there, and returns it.

    What an interrupted call finished is kept: run it again and it goes on. Two processes may
    prepare the same data; the second waits for the first.

    Raises:
        InputError: something about the sources, the tokenizer or the output directory is wrong.
    """
    packed = data.dir / "packed"
    new = [path for path in (packed / "found", packed, *packed.parents) if not path.exists()]
    try:
        if data.sources == "default":
            default_corpus.fetch(data.dir / "default")
        sources = sources_of(data)
        quick = quick_key(data, tokenizer, sources)  # before reading: what changes now is noticed
        made = made_of(data, tokenizer, sources)
        identity = hash_of(made)
        directory = packed / identity
        directory.mkdir(parents=True, exist_ok=True)
        (packed / "found").mkdir(exist_ok=True)
        with _lock(packed / f"{identity}.lock") as lock:
            if not (directory / "MANIFEST.json").is_file():
                try:
                    _make(directory, data, tokenizer, sources, made)
                except InputError:
                    _withdraw(directory, lock)
                    raise
        corpus.write_file(packed / "found" / quick, identity.encode())
        return open_packed(directory, data.context_length, sources, contents=True)
    except (InputError, OSError) as error:
        for path in new:  # of those that this call made, the ones that are empty
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, InputError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "what is finished is kept, make room and run it again" if full else "name another"
        raise InputError(
            f"data.dir: {error.filename or packed}: {error.strerror or error}; {cure}"
        ) from error


def sources_of(data: DataSettings) -> list[SourceSettings]:
    """The configured sources; empty where the default corpus was not fetched yet."""
    if data.sources != "default":
        assert isinstance(data.sources, list)
        return data.sources
    directory = data.dir / "default"
    return [
        SourceSettings(name=name, path=glob.escape(str(directory / f"{name}.jsonl")))
        for name in default_corpus.source_names(directory)
    ]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[Path]:
    """Lets one process in; the system frees the lock of a process that is killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process prepares the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def _withdraw(directory: Path, lock: Path) -> None:
    """Removes a preparation that was refused, unless shards or streamed parts are in it.

    What is wrong with text or tokenizer is noticed before the first shard, and its cure is another
    identity: nobody would ever go on from here.
    """
    if not any(path.suffix in (".npy", ".zst") for path in directory.rglob("*")):
        shutil.rmtree(directory)
        lock.unlink()


def _say(line: str) -> None:
    print(f"data: {line}", file=sys.stderr, flush=True)


def _make(
    directory: Path,
    data: DataSettings,
    settings: TokenizerSettings,
    sources: list[SourceSettings],
    made: dict[str, Any],
) -> None:
    """Fills the directory; every step finds what an earlier call finished of it."""
    work = directory / "work"
    keys = source_keys(sources)
    if settings.directory is not None:
        tokenizers.TextEncoder(settings.directory)  # refuses what cannot be used
    spools: list[Path | None] = [None] * len(sources)
    for index, source in enumerate(sources):
        if not corpus.is_local(source):
            spools[index] = spool = work / f"stream-{index}"
            corpus.stream(source, keys[index], spool, made["sources"][index]["commit"])

    def texts(index: int) -> Iterator[str]:
        return corpus.texts(sources[index], keys[index], spools[index])

    start = time.perf_counter()
    documents = [_survey(work / f"survey-{i}.npz", texts(i)) for i in range(len(sources))]
    own = [_own_validation(source, key) for source, key in zip(sources, keys, strict=True)]
    held = [
        np.zeros_like(found.sizes)
        if validation is not None and found.bytes
        else split.held_out(found, data.validation_bytes, key)
        for validation, found, key in zip(own, documents, keys, strict=True)
    ]
    if settings.path is None:  # no token of our own BPE is shorter than a byte
        for found, behind, key in zip(documents, held, keys, strict=True):
            most = int((found.sizes - behind).sum()) + 2 * len(found.sizes)
            check_fills_a_row(f"{key}: at most {most} tokens do", most, data.context_length)
    total = sum(found.bytes for found in documents)
    _say(f"{_megabytes(total)} of text surveyed in {time.perf_counter() - start:.1f} s")
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        _make_tokenizer(directory / "tokenizer", settings, documents, held, texts)
    encoder = tokenizers.TextEncoder(directory / "tokenizer", "tokenizer.path")
    start = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
        threads = data.processes or tokenizers.cores()
        entries = [
            {
                "name": source.name,
                "train": _pack_training(
                    directory / source.name, encoder, texts(index), held[index], threads, bar
                ),
                "validation": _pack_validation(
                    directory / source.name,
                    encoder,
                    own[index],
                    texts(index),
                    held[index],
                    threads,
                    bar,
                ),
            }
            for index, source in enumerate(sources)
        ]
    _say(f"{_megabytes(total)} tokenised and packed in {time.perf_counter() - start:.1f} s")
    manifest = {
        "made_of": made,
        "vocab_size": encoder.vocab_size,
        "special": {"bos": encoder.bos, "eos": encoder.eos, "pad": encoder.pad},
        "sources": entries,
    }
    corpus.write_file(directory / "MANIFEST.json", json.dumps(manifest, indent=1).encode())
    shutil.rmtree(work)


def _own_validation(source: SourceSettings, key: str) -> list[str] | None:
    """The texts of the source's own validation files; None where it has none."""
    if source.validation is None:
        return None
    paths = corpus.files(source.validation, f"{key}.validation")
    parts = [text for text in corpus.read_files(paths, source.text_field) if text]
    if not parts:
        raise InputError(f"{key}.validation: {source.validation} has no text")
    return parts


def _survey(saved: Path, texts: Iterator[str]) -> split.Documents:
    if saved.is_file():
        with np.load(saved) as arrays:
            return split.Documents(arrays["hashes"], arrays["sizes"])
    found = split.survey(texts)
    buffer = io.BytesIO()
    np.savez(buffer, hashes=found.hashes, sizes=found.sizes)
    saved.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_file(saved, buffer.getvalue())
    return found


def _make_tokenizer(
    directory: Path,
    settings: TokenizerSettings,
    documents: list[split.Documents],
    held: list[NDArray[np.int64]],
    texts: Callable[[int], Iterator[str]],
) -> None:
    if settings.directory is not None:
        tokenizers.copy(settings.directory, directory)
        return
    start = time.perf_counter()
    taken = split.sample(documents, held, settings.train_bytes)
    chosen = (split.sampled(texts(index), part) for index, part in enumerate(taken))
    text = itertools.chain.from_iterable(chosen)
    tokenizers.train(text, settings.vocab_size, directory, mask=settings.mask)
    size = _megabytes(sum(int(part.sum()) for part in taken))
    _say(f"tokenizer trained on {size} in {time.perf_counter() - start:.1f} s")


def _pack_training(
    directory: Path,
    encoder: tokenizers.TextEncoder,
    texts: Iterator[str],
    held: NDArray[np.int64],
    threads: int,
    bar: tqdm,
) -> dict[str, Any]:
    writer = ShardWriter(directory, "train")
    size = documents = 0

    def parts() -> Iterator[str]:
        nonlocal size, documents
        for text, behind in zip(texts, held.tolist(), strict=True):
            part = split.cut(text, behind)[0]
            if part:
                length = len(part.encode())
                size, documents = size + length, documents + 1
                bar.update(length)
                yield part

    rest = itertools.islice(parts(), writer.documents, None)
    shards = writer.write(encoder.encode(rest, threads))
    return {"documents": documents, "bytes": size, "shards": shards}


def _pack_validation(
    directory: Path,
    encoder: tokenizers.TextEncoder,
    own: list[str] | None,
    texts: Iterator[str],
    held: NDArray[np.int64],
    threads: int,
    bar: tqdm,
) -> dict[str, Any]:
    parts = own or [
        split.cut(text, behind)[1]
        for text, behind in zip(texts, held.tolist(), strict=True)
        if behind
    ]
    raw = "".join(parts).encode()
    bar.update(len(raw))
    writer = ShardWriter(directory, "validation")
    rest = itertools.islice(parts, writer.documents, None)
    shards = writer.write(encoder.encode(rest, threads))
    return {
        "documents": len(parts),
        "bytes": len(raw),
        "shards": shards,
        "gzip_bytes": len(gzip.compress(raw, 9)),
        "xz_bytes": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
