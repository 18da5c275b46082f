"""What prepared data says about itself: MANIFEST.json, and a record beside every shard.

Both are JSON of a fixed form. Names of files are not read from them but made from numbers, so that
no record leads out of its directory. MANIFEST.json holds a checksum of itself, and the directory is
named by the hash of what the data was made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from llmnorm.data.identity import hash_of
from llmnorm.machine.reading import checked, read_object
from llmnorm.part import InputError, Settings

NAME = "MANIFEST.json"
# The arrays of a shard: its tokens, where its documents start, and which tokens are trained.
TEXT = ("tokens", "starts")
EXAMPLES = (*TEXT, "trained")


class ShardRecord(Settings):
    """A shard of a stream."""

    files: dict[str, tuple[int, str]]
    """Size in bytes and checksum of each array's file, by their names."""
    tokens: int = Field(ge=1)
    """Tokens in it."""
    documents: int = Field(ge=1)
    """Documents in it."""
    tally: list[Annotated[int, Field(ge=0)]] = []
    """Of conversations: what was counted of their source up to the shard's end."""


class StreamRecord(Settings):
    """The training stream of a source."""

    documents: int = Field(ge=1)
    """Documents in it."""
    bytes: int = Field(ge=1)
    """UTF-8 bytes of their texts."""
    shards: list[ShardRecord]
    """Its shards in their order."""


class ValidationRecord(StreamRecord):
    """The validation stream of a source."""

    gzip_bytes: int = Field(ge=1)
    """What `gzip -9` makes of its text, in bytes."""
    xz_bytes: int = Field(ge=1)
    """What `xz -9e` makes of its text, in bytes."""


class SourceRecord(Settings):
    """A source."""

    name: str
    """Its name, which is its directory's."""
    train: StreamRecord
    """What is trained on."""
    validation: StreamRecord
    """What is held out."""


class TextRecord(SourceRecord):
    """A source of packed text."""

    validation: ValidationRecord
    """What is held out."""


class ExamplesRecord(StreamRecord):
    """A stream of a source of conversations; its documents are examples."""

    tally: list[Annotated[int, Field(ge=0)]]
    """What was counted (conversations.py)."""


class ConversationsRecord(SourceRecord):
    """A source of conversations."""

    train: ExamplesRecord
    """What is trained on."""
    validation: ExamplesRecord
    """What is held out."""


class SpecialTokens(Settings):
    """Ids of special tokens."""

    bos: int = Field(ge=0)
    """Begins a document."""
    eos: int = Field(ge=0)
    """Ends a document."""
    pad: int = Field(ge=0)
    """Fills up a row."""


class Manifest(Settings):
    """Prepared data."""

    made_of: dict[str, Any]
    """What decides the tokens (identity.py)."""
    vocab_size: int = Field(ge=1)
    """Number of token ids."""
    new_tokens: int = Field(default=0, ge=0)
    """How many of these, the last, were added to a tokenizer for the chat template."""
    special: SpecialTokens
    """Ids of special tokens."""
    sources: Sequence[SourceRecord]
    """The sources in their order."""
    tokenizer: dict[str, tuple[int, str]] = {}
    """Size in bytes and checksum of the tokenizer's files, by their names; none in format 1."""
    arrays: ClassVar[tuple[str, ...]] = TEXT
    """The arrays of its shards."""


class TextManifest(Manifest):
    """Prepared text."""

    sources: list[TextRecord]
    """The sources in their order."""


class ConversationsManifest(Manifest):
    """Prepared conversations."""

    sources: list[ConversationsRecord]
    """The sources in their order."""
    arrays = EXAMPLES


Kind = TypeVar("Kind", bound=Manifest)


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its checksum, as it is written."""
    return {**manifest, "checksum": hash_of(manifest)}


def read_manifest(directory: Path, kind: type[Kind], names: list[str] | None = None) -> Kind:
    """The manifest of prepared data.

    Args:
        directory: of the data, named by its identity.
        kind: what it is a manifest of.
        names: of the configured sources; left out, any.

    Raises:
        InputError: it is damaged, or not of this data.
    """
    file = directory / NAME
    try:
        tree = read_object(file)
        problem = _problem(tree, directory.name)
        manifest = checked(tree, kind, str(file)) if problem is None else None
    except InputError as error:
        manifest, problem = None, str(error).removeprefix(f"{file}: ")
    if manifest is not None:
        problem = _disagreement(manifest, names)
        if problem is None:
            return manifest
    raise InputError(f"{file}: is damaged ({problem}); {cure(directory)}")


def cure(directory: Path) -> str:
    """What mends damaged data in a directory: the end of a message."""
    return f"delete {directory} and prepare the data again"


def _problem(tree: dict[str, Any], identity: str) -> str | None:
    """Removes the checksum and compares it."""
    checksum = tree.pop("checksum", None)
    made_of = tree.get("made_of")
    if not isinstance(made_of, dict) or hash_of(made_of) != identity:
        return "it is not of the data that its directory is named by"
    if made_of.get("format") != 1 and checksum != hash_of(tree):
        return "it has not its checksum"
    return None


def _disagreement(manifest: Manifest, names: list[str] | None) -> str | None:
    found = [source.name for source in manifest.sources]
    if names is not None and found != names:
        return f"its sources are {', '.join(found)[:100]}, not {', '.join(names)[:100]}"
    if max(manifest.special.model_dump().values()) >= manifest.vocab_size:
        return "a special token is beyond the vocabulary"
    for source in manifest.sources:
        for part in ("train", "validation"):
            stream: StreamRecord = getattr(source, part)
            if sum(shard.documents for shard in stream.shards) != stream.documents:
                return f"the shards of {source.name} have not the documents of their stream"
            for number, shard in enumerate(stream.shards):
                if [*shard.files] != file_names(part, number, manifest.arrays):
                    return f"a shard of {source.name} has other files than its number says"
    return None


def file_names(stream: str, number: int, arrays: Sequence[str] = TEXT) -> list[str]:
    """The files of a shard, one for each array."""
    return [f"{stream}-{number:05d}.{array}.npy" for array in arrays]
