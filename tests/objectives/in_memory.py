"""Conversations in memory, of lengths that a test chooses."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmnorm.config.file import load
from llmnorm.data.conversations import Conversations, ConversationSource
from llmnorm.objectives.sft import SFT
from tests.running import SMOKE

PAD = 2
SMALLEST, LARGEST = 3, 40  # what tokens lie between


class Stream(NamedTuple):
    """Examples as they are read from disk, and the references of those that are held out."""

    examples: list[tuple[np.ndarray, np.ndarray]]
    references: list[str]

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(ids) for ids, _ in self.examples], np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.examples[index]

    def answer(self, index: int) -> tuple[np.ndarray, str]:
        return self.prompt(index), self.references[index]

    def prompt(self, index: int) -> np.ndarray:
        ids, trained = self.examples[index]
        return ids[~trained]


class Template(NamedTuple):
    """What of a chat template is read when answers are generated."""

    stops: list[int]


def example(context: int, trained: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, of which the last ones are trained."""
    ids = np.random.default_rng(seed).integers(SMALLEST, LARGEST, context + trained)
    return ids, np.arange(context + trained) >= context


def conversations(lengths: list[list[tuple[int, int]]], room: int, **keys: Any) -> Conversations:
    """A source for each list of (context, trained) lengths; it is its own validation."""
    sources = []
    for number, of_source in enumerate(lengths):
        examples = [example(*n, seed=1000 * number + i) for i, n in enumerate(of_source)]
        stream = Stream(examples, [])
        sources.append(
            ConversationSource(
                name=f"source_{number}",
                weight=len(stream),
                examples=len(stream),
                tokens=int(stream.sizes.sum()),
                trained_tokens=sum(trained for _, trained in of_source),
                bytes=100 * (number + 1),
                dropped={},
                train=stream,
                validation=stream,
            )
        )
    values = {
        "directory": Path("nowhere"),
        "identity": "in memory",
        "tokenizer_directory": Path("nowhere"),
        "vocab_size": LARGEST,
        "bos": 0,
        "eos": 1,
        "pad": PAD,
        "context_length": room,
        "sources": sources,
        "template": Template([1]),
    }
    return Conversations(**values | keys)


def objective(data: Conversations, *words: str, batch: int = 4) -> SFT:
    """The objective on them; `words` are settings of the run."""
    settings = [f"data.context_length={data.context_length}", "schedule.warmup=0"]
    settings += ["model.max_position_embeddings=4096", f"training.global_batch={batch}"]
    return SFT(load(SMOKE, ["objective=sft", *settings, *words]).config, data)
