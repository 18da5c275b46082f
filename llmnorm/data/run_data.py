"""What a run reads of its data and writes into its checkpoints, whatever they are made of.

Packed text (packed.py), conversations (conversations.py) and labelled texts (examples.py) are kinds
of `RunData`; each adds its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from llmnorm.data.order import Order


class Stage(NamedTuple):
    """A stretch of a run that reads its sources by one mixture.

    Attributes:
        row: the run's row that it begins with; it ends where the next stage begins.
        weights: of the sources, in their order; 0 of those that it leaves out.
        setting: which of `data.stages` it is; None where it was read by the run that this one has
            branched from.
    """

    row: int
    weights: tuple[int, ...]
    setting: int | None = 0


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
        stages: of the run, in their order (stages.py); the first begins with row 0. None are given
            where the sources have their own weights all along.
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
    stages: tuple[Stage, ...] = ()

    def in_stages(self, stages: Sequence[Stage]) -> Self:
        """The same data, read in these stages."""
        return replace(self, stages=tuple(stages))

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages; at least one."""
        return self.stages or (Stage(0, tuple(source.weight for source in self.sources)),)

    def stage_at(self, row: int) -> int:
        """The number of the stage, from 1, that the run's row `row` is of."""
        return sum(stage.row <= row for stage in self.all_stages)

    def order(self, seed: int) -> Order:
        """Where each row of a run with this seed lies."""
        first, *others = self.all_stages
        later = [(stage.row, stage.weights) for stage in others]
        return Order(first.weights, [source.rows for source in self.sources], seed, later)

    def mixture(self, rows: int) -> list[int]:
        """Whole numbers in proportion to what each source gives of a run of `rows` rows.

        Of one stage they are its weights.
        """
        if len(self.all_stages) == 1:
            return list(self.all_stages[0].weights)
        return self.order(0).visits(rows)

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

    def saved_stages(self) -> list[dict[str, Any]]:
        """The stages as plain values, as checkpoints keep them."""
        names = [source.name for source in self.sources]
        return [
            {**stage._asdict(), "weights": dict(zip(names, stage.weights, strict=True))}
            for stage in self.all_stages
        ]
