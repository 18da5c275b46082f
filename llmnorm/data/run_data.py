"""What a run reads of its data and writes into its checkpoints, whatever they are made of.

Packed text (packed.py), conversations (conversations.py) and labelled texts (examples.py) are kinds
of `RunData`; each adds its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """A source of training data.

    Attributes:
        name, weight: as in the settings; the weight is the number of rows where none is given.
        rows: what the run draws from: packed rows, or examples.
        documents, tokens: of them.
        bytes: UTF-8 bytes of their text.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def weight(self) -> int: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def documents(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def bytes(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Data that a run can be trained on.

    Attributes:
        directory: where they lie.
        identity: a hash of what decides their tokens.
        tokenizer_directory: of their tokenizer.
        vocab_size: number of token ids.
        bos, eos, pad: token ids.
        context_length: labels of a row.
        sources: at least one.
        new_tokens: how many tokens, the last ones, the tokenizer has more than `tokenizer.path`:
            those that the chat template needed.
    """

    directory: Path
    identity: str
    tokenizer_directory: Path
    vocab_size: int
    bos: int
    eos: int
    pad: int
    context_length: int
    sources: Sequence[Source]
    new_tokens: int = 0

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
