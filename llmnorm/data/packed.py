"""Prepared data as a run reads it: sources, their rows and what is known of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmnorm.data.settings import SourceSettings, source_keys
from llmnorm.data.shards import TokenStream, check
from llmnorm.part import InputError


@dataclass(frozen=True)
class PackedSource:
    """A source's rows on disk; sizes of text are UTF-8 bytes, `tokens` counts bos and eos too."""

    name: str
    weight: int
    rows: int
    documents: int
    tokens: int
    bytes: int
    validation_rows: int
    validation_documents: int
    validation_tokens: int
    validation_bytes: int
    validation_gzip_bytes: int
    validation_xz_bytes: int
    train: TokenStream = field(repr=False)
    validation: TokenStream = field(repr=False)


@dataclass(frozen=True)
class PackedData:
    """Prepared data; `bos`, `eos` and `pad` are token ids."""

    directory: Path
    identity: str
    tokenizer_directory: Path
    vocab_size: int
    bos: int
    eos: int
    pad: int
    context_length: int
    sources: list[PackedSource]

    @property
    def rows(self) -> int:
        """Training rows of all sources."""
        return sum(source.rows for source in self.sources)

    def mean(self, figures: Mapping[str, float]) -> float:
        """The mean of a figure over the sources, by name, weighed by their training bytes."""
        weights = {source.name: source.bytes for source in self.sources}
        total = sum(weights.values())
        return sum(weights[name] / total * figure for name, figure in figures.items())

    def sizes(self) -> list[dict[str, str | int]]:
        """The sources in plain values, for what is kept with a checkpoint."""
        keys = "name", "weight", "rows", "documents", "tokens", "bytes"
        return [{key: getattr(source, key) for key in keys} for source in self.sources]


def open_packed(
    directory: Path, context: int, settings: list[SourceSettings], *, contents: bool
) -> PackedData:
    """The data that `packing.prepare` made in `directory`, for rows of `context` labels.

    Args:
        settings: the sources, for their weights and for messages.
        contents: whether the files' checksums are verified, not only their sizes.

    Raises:
        InputError: a shard is missing or damaged, or a source does not fill a row.
    """
    file = directory / "MANIFEST.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, not UTF-8
        raise InputError(
            f"{file}: is damaged; delete {directory} and prepare the data again"
        ) from None
    sources = []
    for entry, source, key in zip(
        manifest["sources"], settings, source_keys(settings), strict=True
    ):
        below = directory / entry["name"]
        streams = {}
        for part in ("train", "validation"):
            check(below, entry[part]["shards"], contents=contents)
            streams[part] = TokenStream(below, entry[part]["shards"])
        train, validation = streams["train"], streams["validation"]
        check_fills_a_row(f"{key}: {train.tokens} tokens do", train.tokens, context)
        rows = (train.tokens - 1) // context
        held = entry["validation"]
        sources.append(
            PackedSource(
                name=entry["name"],
                weight=source.weight or rows,
                rows=rows,
                documents=entry["train"]["documents"],
                tokens=train.tokens,
                bytes=entry["train"]["bytes"],
                validation_rows=-(-(validation.tokens - 1) // context),
                validation_documents=held["documents"],
                validation_tokens=validation.tokens,
                validation_bytes=held["bytes"],
                validation_gzip_bytes=held["gzip_bytes"],
                validation_xz_bytes=held["xz_bytes"],
                train=train,
                validation=validation,
            )
        )
    return PackedData(
        directory=directory,
        identity=directory.name,
        tokenizer_directory=directory / "tokenizer",
        vocab_size=manifest["vocab_size"],
        context_length=context,
        sources=sources,
        **manifest["special"],
    )


def check_fills_a_row(who: str, tokens: int, context: int) -> None:
    """Refuses a source of fewer than `context` + 1 tokens; `who` begins the sentence."""
    if tokens <= context:
        raise InputError(
            f"{who} not fill a row of data.context_length {context}; "
            "give more text, or a shorter context_length"
        )
