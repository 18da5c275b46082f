"""Filling the directory of prepared conversations: tokenizer, survey, shards, manifest.

Every step keeps what an earlier, interrupted call finished of it, as in making.py. A record becomes
one example, or several; a shard ends where a record does, and its JSON file holds what was counted
of the source up to there, so that the next call goes on with the record after it.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmnorm.data import corpus, split
from llmnorm.data.chat import ChatTemplate
from llmnorm.data.example_blocks import COUNTS, DROPPED, Encoder, Item
from llmnorm.data.files import files
from llmnorm.data.making import (
    copy_streams,
    copy_tokenizer,
    megabytes,
    print_bad,
    say,
    survey,
    with_sizes,
    write_manifest,
)
from llmnorm.data.manifest import EXAMPLES
from llmnorm.data.messages import Reader, Unusable
from llmnorm.data.pieces import Block
from llmnorm.data.records import Bad, Record
from llmnorm.data.settings import (
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    source_keys,
    source_names,
)
from llmnorm.data.shards import ShardWriter
from llmnorm.data.tokenizer import TextEncoder, cores, in_order
from llmnorm.part import InputError

AT_ONCE = 1 << 18  # characters that one thread renders and encodes at a time


def items(
    source: SourceSettings,
    key: str,
    bad: Bad,
    spool: Path | None = None,
    paths: list[Path] | None = None,
) -> Iterator[Item]:
    """The source's records in their order.

    Args:
        source: where to read.
        key: the configuration key of the source, for messages.
        bad: is told of records that cannot be read.
        spool: the directory into which a dataset of the hub was copied.
        paths: files to read instead: the source's own validation files.

    Raises:
        InputError: a file is missing, damaged or of another kind, or a record cannot be read and
            is not to be left out.
    """
    reader = Reader(source)
    if paths is not None:
        found = corpus.read_files(paths, reader.fields, f"{key}.validation", bad)
    else:
        found = corpus.records(source, reader.fields, key, spool, bad)
    for record in found:
        try:
            yield Item(record.where, reader.read(record))
        except Unusable as error:
            bad(str(error))


def make_conversations(
    directory: Path,
    data: DataSettings,
    settings: TokenizerSettings,
    sources: list[SourceSettings],
    made: dict[str, Any],
) -> None:
    """Fill the directory.

    Args:
        directory: of the prepared data.
        data, settings: of the data and the tokenizer.
        sources: the sources' settings.
        made: what the data is made of (identity.py), `too_long` among it.

    Raises:
        InputError: the template cannot be used, or a source has nothing that can be trained.
    """
    if settings.path is None:
        raise InputError(
            "tokenizer.path: conversations are prepared for a model that exists; set "
            "model.pretrained, which brings its tokenizer, or tokenizer.path"
        )
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        copy_tokenizer(directory / "tokenizer", settings)
    # The copy's template is the user's file, to the line, unless arguments stand in front of it.
    named = settings.chat_template or settings.path
    called = None if settings.template_arguments else str(named)
    template = ChatTemplate(directory / "tokenizer", called=called)
    if template.dated:
        say("the chat template writes the current date into every example")
    encoder = TextEncoder(directory / "tokenizer", "tokenizer.path")
    keys, names = source_keys(sources), source_names(sources)
    spools = copy_streams(directory, sources, made, _copied)
    start = time.perf_counter()
    bad = [corpus.bad_records(source, key) for source, key in zip(sources, keys, strict=True)]
    documents: list[split.Documents] = []
    own: list[list[Item] | None] = []
    for index, (source, key) in enumerate(zip(sources, keys, strict=True)):
        found = items(source, key, bad[index], spools[index])
        canonical = (item.canonical for item in found)
        documents.append(survey(directory / "work" / f"survey-{index}", canonical))
        own.append(_own(source, key, bad[index]))
    print_bad(sources, bad)
    held_out = [
        np.zeros_like(found.sizes)
        if validation is not None and found.bytes
        else split.held_out(found, data.validation_bytes, name, whole=True)
        for validation, found, name in zip(own, documents, names, strict=True)
    ]
    surveyed = [None if v is None else split.survey(i.canonical for i in v) for v in own]
    withheld = split.withheld(documents, held_out, surveyed, names)
    total = sum(found.bytes for found in documents)
    say(f"{megabytes(total)} of records read in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    encode = Encoder(template, encoder, data.context_length, made["conversations"]["too_long"])
    threads = data.processes or cores()
    entries: list[dict[str, Any]] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
        for index, (source, key, name) in enumerate(zip(sources, keys, names, strict=True)):
            refuse = corpus.bad_records(source, key)
            write = StreamWriter(directory / source.name, encode, threads, refuse, bar, name)
            # Read twice more; bad records were counted above.
            again, once_more = (
                items(source, key, corpus.bad_records(source, key), spools[index]) for _ in "12"
            )
            train = write("train", _chosen(again, withheld[index] == 0, name))
            held = own[index] or _chosen(once_more, held_out[index] > 0, name)
            entry = {"name": source.name, "train": train, "validation": write("validation", held)}
            _print_counts(source.name, train["tally"])
            entries.append(entry)
    place = COUNTS.index("unended")
    if unended := sum(e[p]["tally"][place] for e in entries for p in ("train", "validation")):
        say(
            f"the chat template writes no token after the last answer: {unended} answers have no "
            "end to be trained"
        )
    say(f"{megabytes(total)} rendered and tokenised in {time.perf_counter() - start:.1f} s")
    write_manifest(directory, made, encoder, entries, settings)


def _chosen(found: Iterable[Item], chosen: NDArray[np.bool_], name: str) -> Iterator[Item]:
    """Those of a source's items that are chosen."""
    return (item for item, is_chosen in with_sizes(found, chosen, name) if is_chosen)


def _copied(source: SourceSettings, bad: Bad) -> Callable[[Record], dict[str, Any]]:
    """What is copied of a record of the hub: the fields that are read."""
    reader = Reader(source)

    def copied(record: Record) -> dict[str, Any]:
        found = {name: record.fields.get(name) for name in reader.fields}
        try:
            reader.read(Record(record.where, found))
            json.dumps(found)
        except Unusable as error:
            bad(str(error))
        except TypeError as error:
            bad(f"{record.where}: holds what JSON cannot ({error})")
        else:
            return found
        return {}

    return copied


def _own(source: SourceSettings, key: str, bad: Bad) -> list[Item] | None:
    """The records of the source's own validation files; None where it has none."""
    if source.validation is None:
        return None
    paths = files(source.validation, f"{key}.validation")
    found = list(items(source, key, bad, paths=paths))
    if not found:
        raise InputError(f"{key}.validation: {source.validation} has no records")
    return found


@dataclass
class StreamWriter:
    """Writes the shards of a source's streams.

    Attributes:
        directory: of the source.
        encoder: makes examples of its records.
        threads: how many encode at once.
        bad: is told of records that the template refuses.
        bar: shows how far it is.
        source: what messages call the source.
    """

    directory: Path
    encoder: Encoder
    threads: int
    bad: Bad
    bar: tqdm
    source: str
    _first: str = field(default="", init=False)  # where the first record stands

    def __call__(self, name: str, found: Iterable[Item]) -> dict[str, Any]:
        """Write the shards of a stream; its entry of the manifest.

        Args:
            name: of the stream.
            found: its records.

        Raises:
            InputError: nothing of the records can be trained.
        """
        writer = ShardWriter(self.directory, name, arrays=EXAMPLES)
        done = np.zeros(len(COUNTS), np.int64)
        if writer.records:
            done = np.array(writer.records[-1].tally, np.int64)
        self._first = ""
        rest = itertools.islice(found, int(done[0]), None)
        blocks = in_order(self.encoder.block, self._grouped(rest), self.threads)
        totals = [done]
        records = writer.write(self._counted(blocks, totals))
        tally = dict(zip(COUNTS, totals[-1].tolist(), strict=True))
        if not tally["examples"]:
            raise InputError(self._nothing_left(name, tally))
        return {
            "documents": tally["examples"],
            "bytes": tally["bytes"],
            "shards": [record.model_dump(exclude_defaults=True) for record in records],
            "tally": [*tally.values()],
        }

    def _grouped(self, found: Iterable[Item]) -> Iterator[list[Item]]:
        """Records of about AT_ONCE characters together."""
        group: list[Item] = []
        size = 0
        for item in found:
            self._first = self._first or item.where
            group.append(item)
            size += item.size
            if size >= AT_ONCE:
                self.bar.update(size)
                yield group
                group, size = [], 0
        if group:
            self.bar.update(size)
            yield group

    def _counted(
        self,
        blocks: Iterable[tuple[Block, NDArray[np.int64], list[str]]],
        totals: list[NDArray[np.int64]],
    ) -> Iterator[Block]:
        """Blocks with the counts of the whole stream; `totals` gets those up to a block's end."""
        for block, counts, problems in blocks:
            for problem in problems:
                self.bad(problem)
            assert block.tallies is not None
            before = totals[-1]
            totals.append(before + counts)
            yield Block(
                block.tokens, block.starts, block.ends, block.trained, block.tallies + before
            )

    def _nothing_left(self, name: str, tally: dict[str, int]) -> str:
        kept = "validation records" if name == "validation" else "records"
        why = ", ".join(f"{tally[reason]} {reason}" for reason in DROPPED if tally[reason])
        return (
            f"{self._first}: {self.source}: no example is left of the {tally['records']} {kept} "
            f"from here on ({why}); raise data.context_length {self.encoder.context}, or give "
            "other records"
        )


def _print_counts(name: str, tally: list[int]) -> None:
    """A line about what became of a source's training records."""
    counts = dict(zip(COUNTS, tally, strict=True))
    line = f"{name}: {counts['records']} records became {counts['examples']} examples"
    more = [
        f"{counts[count]} {what}"
        for count, what in {
            "split": "conversations one for each answer",
            "cut": "texts cut into several",
            "truncated": "truncated",
            **{reason: f"left out, {reason}" for reason in DROPPED},
        }.items()
        if counts[count]
    ]
    say(f"{line} ({'; '.join(more)})" if more else line)
