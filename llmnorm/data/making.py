"""Filling the directory of prepared data: survey, tokenizer, shards, manifest.

Every step keeps what an earlier, interrupted call finished of it. The directory's `work` holds what
is needed until then: hashes and sizes of all documents, and the copies of streamed datasets.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import lzma
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmnorm.data import corpus, files, hub, split
from llmnorm.data import tokenizer as tokenizers
from llmnorm.data.manifest import NAME, signed
from llmnorm.data.packed import check_fills_a_row, file_record
from llmnorm.data.records import Bad, BadRecords, Record, text_of
from llmnorm.data.settings import (
    TOKENIZER_FILES,
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    source_keys,
    source_names,
)
from llmnorm.data.shards import ShardWriter
from llmnorm.data.templates import missing_tokens, template_tokens, write_template
from llmnorm.machine.reading import read_bytes
from llmnorm.part import InputError

_DIGEST = 16  # bytes


def say(line: str) -> None:
    """Print a line about the data."""
    print(f"data: {line}", file=sys.stderr, flush=True)


def make(
    directory: Path,
    data: DataSettings,
    settings: TokenizerSettings,
    sources: list[SourceSettings],
    made: dict[str, Any],
) -> None:
    """Fill the directory; every step keeps what an earlier, interrupted call finished of it."""
    work, format = directory / "work", made["format"]
    keys, names = source_keys(sources), source_names(sources)
    if settings.directory is not None:
        tokenizers.check_special_tokens(settings.directory, "tokenizer.path")
    bad = [corpus.bad_records(source, key) for source, key in zip(sources, keys, strict=True)]
    spools = copy_streams(directory, sources, made, _text_copied)

    def texts(index: int, bad: Bad | None = None) -> Iterator[str]:
        return corpus.texts(sources[index], keys[index], spools[index], bad)

    start = time.perf_counter()
    documents = [survey(work / f"survey-{i}", texts(i, bad[i])) for i in range(len(sources))]
    own = [corpus.validation_texts(*of) for of in zip(sources, keys, bad, strict=True)]
    print_bad(sources, bad)
    held_out = [
        np.zeros_like(found.sizes)
        if validation is not None and found.bytes
        else split.held_out(found, data.validation_bytes, name, format=format)
        for validation, found, name in zip(own, documents, names, strict=True)
    ]
    withheld = held_out
    if format > 1:
        surveyed = [None if texts is None else split.survey(texts) for texts in own]
        withheld = split.withheld(documents, held_out, surveyed, names)
    if settings.path is None:
        # A token of our own BPE is at least a byte long, so too little text is noticed right here.
        for found, kept_back, name in zip(documents, withheld, names, strict=True):
            most = int((found.sizes - kept_back).sum()) + 2 * len(found.sizes)
            check_fills_a_row(f"{name}: at most {most} tokens do", most, data.context_length)
    _print_held_out(sources, documents, held_out, withheld, own)
    total = sum(found.bytes for found in documents)
    say(f"{megabytes(total)} of text read and measured in {time.perf_counter() - start:.1f} s")
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        if settings.directory is not None:
            copy_tokenizer(directory / "tokenizer", settings)
        else:
            _train_tokenizer(directory / "tokenizer", settings, documents, withheld, texts, format)
    encoder = tokenizers.TextEncoder(directory / "tokenizer", "tokenizer.path")
    start = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
        threads = data.processes or tokenizers.cores()
        entries = []
        for index, (source, name) in enumerate(zip(sources, names, strict=True)):
            encode = _Encode(directory / source.name, encoder, threads, format, bar)
            train = with_sizes(texts(index), withheld[index], name)
            validation: Iterable[str] | None = own[index]
            if validation is None:
                held = with_sizes(texts(index), held_out[index], name)
                validation = (split.cut(text, size)[1] for text, size in held if size)
            entries.append(
                {
                    "name": source.name,
                    "train": encode.training(split.cut(text, size)[0] for text, size in train),
                    "validation": encode.validation(validation),
                }
            )
    say(f"{megabytes(total)} tokenised and packed in {time.perf_counter() - start:.1f} s")
    write_manifest(directory, made, encoder, entries, settings)


def write_manifest(
    directory: Path,
    made: dict[str, Any],
    encoder: tokenizers.TextEncoder,
    entries: list[dict[str, Any]],
    settings: TokenizerSettings,
) -> None:
    """Write the manifest of prepared data, and remove what was needed until then.

    Args:
        directory: of the data.
        made: what it is made of.
        encoder: its tokenizer.
        entries: of the sources, in their order.
        settings: of the tokenizer.
    """
    new = 0
    if settings.directory is not None:
        new = encoder.vocab_size - tokenizers.TextEncoder(settings.directory).vocab_size
    manifest = {
        "made_of": made,
        "vocab_size": encoder.vocab_size,
        **({"new_tokens": new} if new else {}),
        "special": {"bos": encoder.bos, "eos": encoder.eos, "pad": encoder.pad},
        "sources": entries,
        "tokenizer": {  # not what a killed call left there half written
            name: file_record(directory / "tokenizer" / name)
            for name in sorted(TOKENIZER_FILES)
            if (directory / "tokenizer" / name).is_file()
        },
    }
    # Through JSON first, so that its checksum is of what will be read.
    manifest = signed(json.loads(json.dumps(manifest)))
    files.write_file(directory / NAME, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(directory / "work")


def copy_streams(
    directory: Path,
    sources: list[SourceSettings],
    made: dict[str, Any],
    copied: Callable[[SourceSettings, Bad], Callable[[Record], dict[str, Any]]],
) -> list[Path | None]:
    """Copy the datasets of the hub into the directory's `work`.

    Args:
        directory: of the prepared data.
        sources: the sources' settings.
        made: what the data is made of, the datasets' commits among it.
        copied: makes the function that says what is copied of a record.

    Returns:
        Where each source's copy lies; None for those of this machine.
    """
    spools: list[Path | None] = [None] * len(sources)
    for index, (source, key) in enumerate(zip(sources, source_keys(sources), strict=True)):
        if not hub.is_local(source):
            spools[index] = spool = directory / "work" / f"stream-{index}"
            commit = made["sources"][index]["commit"]
            uncounted = corpus.bad_records(source, key)  # they are counted when read
            hub.stream(source, key, spool, commit, copied(source, uncounted))
    return spools


def _text_copied(source: SourceSettings, bad: Bad) -> Callable[[Record], dict[str, Any]]:
    """What is copied of a record of the hub: its text."""
    return lambda record: {"text": text_of(record, source.text_field, bad)}


def print_bad(sources: list[SourceSettings], bad: list[BadRecords]) -> None:
    """A line for each source of which bad records are left out."""
    for source, records in zip(sources, bad, strict=True):
        if records.count:
            more = ", ..." if records.count > len(records.first) else ""
            say(
                f"{source.name}: {records.count} bad records are left out: "
                f"{'; '.join(records.first)}{more}"
            )


def _print_held_out(
    sources: list[SourceSettings],
    documents: list[split.Documents],
    held_out: list[NDArray[np.int64]],
    withheld: list[NDArray[np.int64]],
    own: list[list[str] | None],
) -> None:
    """A line a source: how much of it is validation text, its own or that of another source."""
    for source, found, held, kept_back, validation in zip(
        sources, documents, held_out, withheld, own, strict=True
    ):
        size = int(held.sum())
        line = f"{source.name}: {size / 1e3:.1f} kB of {found.bytes / 1e3:.1f} kB are held out"
        if validation is not None:
            line = f"{source.name}: validated on {len(validation)} documents of its own files"
        if more := int((kept_back - held).sum()):
            count = int((kept_back > held).sum())
            line += (
                f"; {more / 1e3:.1f} kB more in {count} documents are not trained on, being "
                "validation text of another source"
            )
        say(line)


_Read = TypeVar("_Read")


def with_sizes(
    texts: Iterable[_Read], sizes: NDArray[Any], name: str
) -> Iterator[tuple[_Read, Any]]:
    """Each text, or other item, of a source with its number.

    Raises:
        InputError: there are more or fewer texts than when the source was surveyed.
    """
    try:
        yield from zip(texts, sizes.tolist(), strict=True)
    except InputError:
        raise
    except ValueError:
        raise InputError(
            f"{name}: has other documents than when it was read first, a moment ago; prepare it "
            "again when nothing writes to it"
        ) from None


def survey(saved: Path, texts: Iterator[str]) -> split.Documents:
    """Hash and size of every document, read from `saved` or else computed and written there."""
    if saved.is_file():
        content = read_bytes(saved, limit=saved.stat().st_size)
        arrays = content[_DIGEST:]
        if content[:_DIGEST] == hashlib.blake2b(arrays, digest_size=_DIGEST).digest():
            hashes, sizes = np.frombuffer(arrays, np.uint64).reshape(2, -1)
            return split.Documents(hashes, sizes.view(np.int64))
    found = split.survey(texts)
    arrays = found.hashes.tobytes() + found.sizes.tobytes()
    saved.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(saved, hashlib.blake2b(arrays, digest_size=_DIGEST).digest() + arrays)
    return found


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A directory to fill, which then takes the place of `directory`, whole or not at all."""
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)


def copy_tokenizer(directory: Path, settings: TokenizerSettings) -> None:
    """Copy the configured tokenizer, with the configured template and the tokens that it needs.

    Raises:
        InputError: its files or its template cannot be used.
    """
    assert settings.directory is not None
    tokenizers.check_special_tokens(settings.directory, "tokenizer.path")
    with written_whole(directory) as part:
        tokenizers.copy(settings.directory, part)
        new = missing_tokens(part, settings)
        write_template(part, settings)
    if new:
        say(
            f"the tokenizer has no {', '.join(new)}, which the chat template writes: added, with "
            "the ids behind its last token"
        )


def _train_tokenizer(
    directory: Path,
    settings: TokenizerSettings,
    documents: list[split.Documents],
    withheld: list[NDArray[np.int64]],
    texts: Callable[[int], Iterator[str]],
    format: int,
) -> None:
    """Train a tokenizer on a sample of the training text."""
    start = time.perf_counter()
    taken = split.sample(documents, withheld, settings.train_bytes)
    chosen = (split.sampled(texts(index), part) for index, part in enumerate(taken))
    text = itertools.chain.from_iterable(chosen)
    with written_whole(directory) as part_written:
        trained = tokenizers.train(
            text,
            settings.vocab_size,
            part_written,
            mask=settings.mask,
            special=template_tokens(settings),
            format=format,
        )
        write_template(part_written, settings)
    size = megabytes(sum(int(part.sum()) for part in taken))
    say(f"tokenizer trained on {size} in {time.perf_counter() - start:.1f} s")
    if trained.vocab_size < settings.vocab_size:
        say(
            f"the tokenizer has {trained.vocab_size} tokens, fewer than tokenizer.vocab_size "
            f"{settings.vocab_size}: the text has no more pairs to join"
        )
    if trained.cut_words:
        say(
            f"{trained.cut_words} words of more than {tokenizers.LONGEST_WORD} characters were cut "
            "to train the tokenizer (not to encode them)"
        )


class _Encode(NamedTuple):
    """Writes the shards of a source."""

    directory: Path
    encoder: tokenizers.TextEncoder
    threads: int
    format: int
    bar: tqdm

    def training(self, parts: Iterable[str]) -> dict[str, Any]:
        """Write the training shards; their entry of the manifest."""
        size = documents = 0

        def counted() -> Iterator[str]:
            nonlocal size, documents
            for part in parts:
                if part:
                    length = len(part.encode())
                    size, documents = size + length, documents + 1
                    self.bar.update(length)
                    yield part

        shards = self._write("train", counted())
        return {"documents": documents, "bytes": size, "shards": shards}

    def validation(self, texts: Iterable[str]) -> dict[str, Any]:
        """Write the validation shards; their entry of the manifest."""
        parts = list(texts)
        raw = "".join(parts).encode()
        self.bar.update(len(raw))
        return {
            "documents": len(parts),
            "bytes": len(raw),
            "shards": self._write("validation", iter(parts)),
            "gzip_bytes": len(gzip.compress(raw, 9)),
            "xz_bytes": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
        }

    def _write(self, name: str, parts: Iterator[str]) -> list[dict[str, Any]]:
        writer = ShardWriter(self.directory, name)
        unwritten = itertools.islice(parts, writer.documents, None)
        blocks = self.encoder.encode(unwritten, self.threads, format=self.format)
        return [record.model_dump(exclude_defaults=True) for record in writer.write(blocks)]


def megabytes(size: int) -> str:
    """A size for a message."""
    return f"{size / 1e6:.1f} MB"
