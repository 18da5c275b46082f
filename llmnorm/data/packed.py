"""Prepared data as a run reads it: its sources, their rows and their sizes."""

from dataclasses import dataclass, field
from pathlib import Path

from llmnorm.data.manifest import Manifest, TextManifest, cure, read_manifest
from llmnorm.data.run_data import RunData
from llmnorm.data.settings import TOKENIZER_FILES, SourceSettings, source_names
from llmnorm.data.shards import TokenStream, checksum
from llmnorm.machine.reading import read_bytes
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


@dataclass(frozen=True, kw_only=True)
class PackedData(RunData):
    """Prepared text."""

    sources: list[PackedSource]


def open_packed(
    directory: Path, context: int, settings: list[SourceSettings], *, contents: bool
) -> PackedData:
    """Open the data that `packing.prepare` made in `directory`.

    Args:
        directory: where the data lies.
        context: labels of a row.
        settings: the sources' settings, for their weights and for messages.
        contents: verify the shards' checksums now, not when each is first read.

    Raises:
        InputError: the manifest, the tokenizer or a shard is missing or damaged, or a source does
            not fill a row.
    """
    manifest = read_manifest(directory, TextManifest, [source.name for source in settings])
    check_tokenizer(directory, manifest)
    sources = []
    for entry, source, name in zip(manifest.sources, settings, source_names(settings), strict=True):
        of_train, of_validation, vocabulary = entry.train, entry.validation, manifest.vocab_size
        train = TokenStream(directory / source.name, "train", of_train.shards, vocabulary)
        validation = TokenStream(
            directory / source.name, "validation", of_validation.shards, vocabulary
        )
        if contents:
            train.verify()
            validation.verify()
        check_fills_a_row(f"{name}: {train.tokens} tokens do", train.tokens, context)
        rows = (train.tokens - 1) // context
        sources.append(
            PackedSource(
                name=source.name,
                weight=source.weight or rows,
                rows=rows,
                documents=of_train.documents,
                tokens=train.tokens,
                bytes=of_train.bytes,
                validation_rows=-(-(validation.tokens - 1) // context),
                validation_documents=of_validation.documents,
                validation_tokens=validation.tokens,
                validation_bytes=of_validation.bytes,
                validation_gzip_bytes=of_validation.gzip_bytes,
                validation_xz_bytes=of_validation.xz_bytes,
                train=train,
                validation=validation,
            )
        )
    return PackedData(
        directory=directory,
        identity=directory.name,
        tokenizer_directory=directory / "tokenizer",
        vocab_size=manifest.vocab_size,
        new_tokens=manifest.new_tokens,
        context_length=context,
        sources=sources,
        **manifest.special.model_dump(),
    )


def check_tokenizer(directory: Path, manifest: Manifest) -> None:
    """Refuse prepared data whose tokenizer is damaged."""
    for name, recorded in manifest.tokenizer.items():
        path = directory / "tokenizer" / name
        if name not in TOKENIZER_FILES or file_record(path) != recorded:
            raise InputError(f"{path}: is missing or damaged; {cure(directory)}")


def file_record(path: Path) -> tuple[int, str]:
    """Size and checksum of a file, as a manifest records them; (-1, "") where there is none."""
    if not path.is_file():
        return -1, ""
    content = read_bytes(path)
    return len(content), checksum(content)


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
