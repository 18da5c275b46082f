"""Prepared data as a run reads it: its sources, their rows and their sizes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmnorm.data.settings import SourceSettings, source_keys
from llmnorm.data.shards import TokenStream, check
from llmnorm.part import InputError


@dataclass(frozen=True)
class PackedSource:
    """A source's rows on disk.

    Sizes of text are UTF-8 bytes. `tokens` and `validation_tokens` include bos and eos. The gzip
    and xz sizes are of the validation text, all documents in one stream.
    """

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
        """The mean of figures by source name, weighted by the sources' training bytes."""
        weights = {source.name: source.bytes for source in self.sources}
        total = sum(weights.values())
        return sum(weights[name] / total * figure for name, figure in figures.items())

    def sizes(self) -> list[dict[str, str | int]]:
        """The sources' sizes as plain values, as checkpoints keep them."""
        keys = "name", "weight", "rows", "documents", "tokens", "bytes"
        return [{key: getattr(source, key) for key in keys} for source in self.sources]


def open_packed(
    directory: Path, context: int, settings: list[SourceSettings], *, contents: bool
) -> PackedData:
    """Open the data that `packing.prepare` made in `directory`.

    Args:
        directory: where the data lies.
        context: labels of a row.
        settings: the sources' settings, for their weights and for messages.
        contents: verify the files' checksums, not only their sizes.

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
        source_directory = directory / entry["name"]
        streams = {}
        for part in ("train", "validation"):
            check(source_directory, entry[part]["shards"], contents=contents)
            streams[part] = TokenStream(source_directory, entry[part]["shards"])
        train, validation = streams["train"], streams["validation"]
        check_fills_a_row(f"{key}: {train.tokens} tokens do", train.tokens, context)
        rows = (train.tokens - 1) // context
        of_validation = entry["validation"]
        sources.append(
            PackedSource(
                name=entry["name"],
                weight=source.weight or rows,
                rows=rows,
                documents=entry["train"]["documents"],
                tokens=train.tokens,
                bytes=entry["train"]["bytes"],
                validation_rows=-(-(validation.tokens - 1) // context),
                validation_documents=of_validation["documents"],
                validation_tokens=validation.tokens,
                validation_bytes=of_validation["bytes"],
                validation_gzip_bytes=of_validation["gzip_bytes"],
                validation_xz_bytes=of_validation["xz_bytes"],
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


def check_fills_a_row(beginning: str, tokens: int, context: int) -> None:
    """Refuse a source with fewer than `context` + 1 tokens.

    Args:
        beginning: of the message: "data.sources.0 (books): 17 tokens do".
    """
    if tokens <= context:
        raise InputError(
            f"{beginning} not fill a row of data.context_length {context}; "
            "give more text, or a shorter context_length"
        )
