"""Preparing data: from the configured sources to packed rows on disk.

A document becomes bos + tokens + eos; the documents of a source, one after the other, are its
stream. Row i is stream[i C : i C + C + 1] with C = `context_length`. Rows of one source overlap by
one token, so every token but the stream's first is a label once (those that start a document are
ignored). Training rows are full; the last validation row is padded, so that every token of the
validation text is counted. tests/test_data/test_packing.py holds both.

    <data.dir>/packed/<identity>/tokenizer/      the tokenizer
    <data.dir>/packed/<identity>/<source>/       the source's shards (shards.py)
    <data.dir>/packed/<identity>/MANIFEST.json   sizes and checksums; written last
    <data.dir>/packed/found/<quick key>          an identity, by the input files' paths, sizes and
                                                 times, so that `find` need not read the files

Context length, weights and seed are not part of the identity: they only say how the same tokens are
read.
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
    """The prepared data of these settings, or None if there is none.

    The input files are looked at (path, size, time), not read.

    Raises:
        InputError: a source's files are missing, or the prepared files are damaged.
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
    """The prepared data of these settings; a single process prepares it if it is missing.

    Args:
        data, tokenizer: the settings.
        alone: whether this is the only process.
        command: the command that prepares the data, for the message.

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
    """Prepare the data of these settings, or verify the checksums of what is there already.

    What an interrupted call finished is kept, and the next call continues after it. Two processes
    may prepare the same data; the second waits for the first.

    Raises:
        InputError: a source, the tokenizer or the output directory cannot be used.
    """
    packed = data.dir / "packed"
    created = [path for path in (packed / "found", packed, *packed.parents) if not path.exists()]
    try:
        if data.sources == "default":
            default_corpus.fetch(data.dir / "default")
        sources = sources_of(data)
        # Taken before the files are read, so that a file which changes meanwhile gets another key.
        quick = quick_key(data, tokenizer, sources)
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
                    _remove_if_unusable(directory, lock)
                    raise
        corpus.write_file(packed / "found" / quick, identity.encode())
        return open_packed(directory, data.context_length, sources, contents=True)
    except (InputError, OSError) as error:
        for path in created:
            with contextlib.suppress(OSError):  # it is not empty, or it was not made
                path.rmdir()
        if isinstance(error, InputError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "set another data.dir"
        if full:
            cure = "finished shards are kept, so make room and run it again"
        raise InputError(
            f"data.dir: {error.filename or packed}: {error.strerror or error}; {cure}"
        ) from error


def sources_of(data: DataSettings) -> list[SourceSettings]:
    """The configured sources; an empty list where the default corpus was not fetched yet."""
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
    """Hold a lock file; the system frees the lock of a process that is killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _print("another process prepares the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def _remove_if_unusable(directory: Path, lock: Path) -> None:
    """Remove the directory of a refused preparation, unless it has shards or streamed parts.

    Mistakes in texts or tokenizer are noticed before the first shard. Curing them changes the
    identity, so no later call would use this directory.
    """
    if not any(path.suffix in (".npy", ".zst") for path in directory.rglob("*")):
        shutil.rmtree(directory)
        lock.unlink()


def _print(line: str) -> None:
    print(f"data: {line}", file=sys.stderr, flush=True)


def _make(
    directory: Path,
    data: DataSettings,
    settings: TokenizerSettings,
    sources: list[SourceSettings],
    made: dict[str, Any],
) -> None:
    """Fill the directory; every step keeps what an earlier, interrupted call finished of it."""
    work = directory / "work"
    keys = source_keys(sources)
    if settings.directory is not None:
        tokenizers.TextEncoder(settings.directory)  # raises InputError if it cannot be used
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
    held_out = [
        np.zeros_like(found.sizes)
        if validation is not None and found.bytes
        else split.held_out(found, data.validation_bytes, key)
        for validation, found, key in zip(own, documents, keys, strict=True)
    ]
    if settings.path is None:
        # A token of our own BPE is at least a byte long, so too little text is noticed right here.
        for found, held_bytes, key in zip(documents, held_out, keys, strict=True):
            most = int((found.sizes - held_bytes).sum()) + 2 * len(found.sizes)
            check_fills_a_row(f"{key}: at most {most} tokens do", most, data.context_length)
    total = sum(found.bytes for found in documents)
    _print(f"{_megabytes(total)} of text read and measured in {time.perf_counter() - start:.1f} s")
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        _make_tokenizer(directory / "tokenizer", settings, documents, held_out, texts)
    encoder = tokenizers.TextEncoder(directory / "tokenizer", "tokenizer.path")
    start = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
        threads = data.processes or tokenizers.cores()
        entries = [
            {
                "name": source.name,
                "train": _pack_training(
                    directory / source.name, encoder, texts(index), held_out[index], threads, bar
                ),
                "validation": _pack_validation(
                    directory / source.name,
                    encoder,
                    own[index],
                    texts(index),
                    held_out[index],
                    threads,
                    bar,
                ),
            }
            for index, source in enumerate(sources)
        ]
    _print(f"{_megabytes(total)} tokenised and packed in {time.perf_counter() - start:.1f} s")
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
    """Hash and size of every document, read from `saved` or else computed and written there."""
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
    held_out: list[NDArray[np.int64]],
    texts: Callable[[int], Iterator[str]],
) -> None:
    """Copy the configured tokenizer, or train one on a sample of the training text."""
    if settings.directory is not None:
        tokenizers.copy(settings.directory, directory)
        return
    start = time.perf_counter()
    taken = split.sample(documents, held_out, settings.train_bytes)
    chosen = (split.sampled(texts(index), part) for index, part in enumerate(taken))
    text = itertools.chain.from_iterable(chosen)
    tokenizers.train(text, settings.vocab_size, directory, mask=settings.mask)
    size = _megabytes(sum(int(part.sum()) for part in taken))
    _print(f"tokenizer trained on {size} in {time.perf_counter() - start:.1f} s")


def _pack_training(
    directory: Path,
    encoder: tokenizers.TextEncoder,
    texts: Iterator[str],
    held_out: NDArray[np.int64],
    threads: int,
    bar: tqdm,
) -> dict[str, Any]:
    """Write a source's training shards; their entry of the manifest."""
    writer = ShardWriter(directory, "train")
    size = documents = 0

    def parts() -> Iterator[str]:
        nonlocal size, documents
        for text, held_bytes in zip(texts, held_out.tolist(), strict=True):
            part = split.cut(text, held_bytes)[0]
            if part:
                length = len(part.encode())
                size, documents = size + length, documents + 1
                bar.update(length)
                yield part

    unwritten = itertools.islice(parts(), writer.documents, None)
    shards = writer.write(encoder.encode(unwritten, threads))
    return {"documents": documents, "bytes": size, "shards": shards}


def _pack_validation(
    directory: Path,
    encoder: tokenizers.TextEncoder,
    own: list[str] | None,
    texts: Iterator[str],
    held_out: NDArray[np.int64],
    threads: int,
    bar: tqdm,
) -> dict[str, Any]:
    """Write a source's validation shards; their entry of the manifest."""
    parts = own or [
        split.cut(text, held_bytes)[1]
        for text, held_bytes in zip(texts, held_out.tolist(), strict=True)
        if held_bytes
    ]
    raw = "".join(parts).encode()
    bar.update(len(raw))
    writer = ShardWriter(directory, "validation")
    unwritten = itertools.islice(parts, writer.documents, None)
    shards = writer.write(encoder.encode(unwritten, threads))
    return {
        "documents": len(parts),
        "bytes": len(raw),
        "shards": shards,
        "gzip_bytes": len(gzip.compress(raw, 9)),
        "xz_bytes": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
