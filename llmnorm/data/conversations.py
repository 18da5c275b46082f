"""Conversations as examples on disk, with the tokens of each that are trained.

    conversations = ConversationData(data, tokenizer, too_long="truncate").prepare()
    ids, trained = conversations.sources[0].train.read(17)

A record of a source (messages.py) becomes one example, or one for each answer (chat.py). A plain
text becomes bos + tokens + eos, cut into rows as packed text is, and all of it is trained. An
example has at most `context_length` + 1 tokens. A longer conversation loses its end or is left out,
as `too_long` says; what has no trained token left is left out and counted.

What would surprise: context length and `too_long` are part of the identity, other than for packed
text. The records that are held out are chosen as documents are (split.py), never a part of one.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmnorm.data.chat import ChatTemplate
from llmnorm.data.making_conversations import COUNTS, DROPPED, make_conversations
from llmnorm.data.manifest import (
    EXAMPLES,
    ConversationsManifest,
    ExamplesRecord,
    read_manifest,
)
from llmnorm.data.packed import check_tokenizer
from llmnorm.data.prepared import Preparation
from llmnorm.data.run_data import RunData
from llmnorm.data.settings import DataSettings, SourceSettings, TokenizerSettings
from llmnorm.data.shards import TokenStream

# Version of the rules by which records become examples; raised when they would give others.
RULES = 1


class ExampleStream:
    """Examples on disk, read as they are needed.

    Args:
        stream: their shards.
        template: says which of an answer's tokens are its text.
    """

    def __init__(self, stream: TokenStream, template: ChatTemplate) -> None:
        self._stream, self._template = stream, template

    @cached_property
    def _borders(self) -> NDArray[np.int64]:
        return np.append(self._stream.starts(), self._stream.tokens)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The tokens of each example; (examples,)."""
        return np.diff(self._borders)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def read(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """An example: its token ids, and which of them are labels; (tokens,) both.

        Raises:
            InputError: its shard is damaged.
        """
        start, size = int(self._borders[index]), int(self.sizes[index])
        ids, trained = np.empty(size, np.int64), np.empty(size, bool)
        self._stream.read(start, ids)
        self._stream.trained(start, trained)
        return ids, trained

    def answer(self, index: int) -> tuple[NDArray[np.int64], str]:
        """What stands before the last answer of an example, and the answer's text.

        Of a plain text the first token, and the text.
        """
        ids, trained = self.read(index)
        last = int(np.flatnonzero(trained)[-1]) + 1
        before = np.flatnonzero(~trained[:last])
        first = int(before[-1]) + 1
        return ids[:first], self._template.decode(ids[first:last].tolist())

    def verify(self) -> None:
        """Compare the checksums of all shards.

        Raises:
            InputError: a shard is damaged; names the first one.
        """
        self._stream.verify()


@dataclass(frozen=True)
class ConversationSource:
    """A source's examples on disk.

    Attributes:
        name, weight: as in the settings; the weight is the number of examples where none is given.
        examples, tokens, trained_tokens: of the training examples, which are the run's rows.
        bytes: UTF-8 bytes of what the messages of their records say.
        dropped: how many training examples (or records) were left out, by the reason.
        train, validation: the examples.
    """

    name: str
    weight: int
    examples: int
    tokens: int
    trained_tokens: int
    bytes: int
    dropped: dict[str, int]
    train: ExampleStream = field(repr=False)
    validation: ExampleStream = field(repr=False)

    @property
    def rows(self) -> int:
        """The examples: what a run draws from."""
        return self.examples

    @property
    def documents(self) -> int:
        """The examples, which the shards keep as documents."""
        return self.examples

    @property
    def validation_tokens(self) -> int:
        """Tokens of the validation examples."""
        return int(self.validation.sizes.sum())


@dataclass(frozen=True, kw_only=True)
class Conversations(RunData):
    """Prepared conversations.

    Attributes:
        template: renders them.
    """

    sources: list[ConversationSource]
    template: ChatTemplate = field(repr=False)

    def row_tokens(self, examples: int) -> float:
        """Tokens that an average example takes of a row, in a run of so many examples."""
        weights = self.mixture(examples)
        pairs = zip(weights, self.sources, strict=True)
        return sum(w * (s.tokens / s.examples - 1) for w, s in pairs) / sum(weights)


class ConversationData(Preparation[Conversations]):
    """How conversations are prepared and opened.

    Args:
        data, tokenizer: the settings.
        too_long: what is done with conversations that are too long, `truncate` or `drop`.
    """

    def __init__(self, data: DataSettings, tokenizer: TokenizerSettings, too_long: str) -> None:
        super().__init__(data, tokenizer)
        chosen = {"context_length": data.context_length, "too_long": too_long, "rules": RULES}
        self.rules = {"conversations": chosen}

    def make(self, directory: Path, sources: list[SourceSettings], made: dict[str, Any]) -> None:
        """Fill the directory."""
        make_conversations(directory, self.data, self.tokenizer, sources, made)

    def manifest(self, directory: Path) -> ConversationsManifest:
        """The manifest of the directory."""
        return read_manifest(directory, ConversationsManifest)

    def open(
        self, directory: Path, sources: list[SourceSettings], *, contents: bool
    ) -> Conversations:
        """The prepared conversations in a directory."""
        manifest = read_manifest(directory, ConversationsManifest, [s.name for s in sources])
        check_tokenizer(directory, manifest)
        template = ChatTemplate(directory / "tokenizer")

        def stream(name: str, source: str, record: ExamplesRecord) -> ExampleStream:
            found = TokenStream(
                directory / source, name, record.shards, manifest.vocab_size, EXAMPLES
            )
            if contents:
                found.verify()
            return ExampleStream(found, template)

        opened = []
        for entry, settings in zip(manifest.sources, sources, strict=True):
            counts = dict(zip(COUNTS, entry.train.tally, strict=True))
            opened.append(
                ConversationSource(
                    name=entry.name,
                    weight=settings.weight or counts["examples"],
                    examples=counts["examples"],
                    tokens=counts["tokens"],
                    trained_tokens=counts["trained"],
                    bytes=entry.train.bytes,
                    dropped={reason: counts[reason] for reason in DROPPED},
                    train=stream("train", entry.name, entry.train),
                    validation=stream("validation", entry.name, entry.validation),
                )
            )
        return Conversations(
            directory=directory,
            identity=directory.name,
            tokenizer_directory=directory / "tokenizer",
            vocab_size=manifest.vocab_size,
            new_tokens=manifest.new_tokens,
            context_length=self.data.context_length,
            sources=opened,
            template=template,
            **manifest.special.model_dump(),
        )

    def table(self, opened: Conversations, rows: int) -> str:
        """A line a source, and why examples were left out."""
        from llmnorm.data.report import conversations_table

        return conversations_table(opened, rows)

    def show(self, opened: Conversations, count: int, *, seed: int) -> None:
        """Print the run's first examples, and what of them is trained."""
        from llmnorm.data.report import show_conversations

        show_conversations(opened, count, seed=seed)
