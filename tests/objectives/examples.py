"""Conversations in memory, of lengths that a test chooses, and on disk, for whole runs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

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


TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def on_disk(place: Path, base: Path) -> Path:
    """A configuration of 12 steps that goes on from the run `base`, and its records.

    There are two sources of uneven size. A record of the first is too long, so that nothing of it
    can be trained.
    """
    (place / "template.jinja").write_text(TEMPLATE)
    sums = [(f"{a}+{b}?", str(a + b)) for a in range(12) for b in range(9)]
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in [*sums, ("long " * 80, "answer")]
    ]
    words = [{"prompt": f"Say {n}", "completion": "word " * (n % 7 + 1)} for n in range(30)]
    for name, records in (("sums", [{"messages": t} for t in turns]), ("words", words)):
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    sources = [{"name": name, "path": str(place / f"{name}.jsonl")} for name in ("sums", "words")]
    template = {"chat_template": str(place / "template.jinja")}
    tree = {
        "data": {"sources": sources, "context_length": 64, "dir": str(place / "data")},
        "model": {"pretrained": str(base)},
        "tokenizer": {"path": str(base / "tokenizer"), **template},
        "objective": "sft",
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "constant", "warmup": 0},
        "training": {"steps": 12, "global_batch": 7, "micro_batch": 2},
        "evaluation": {"every": 6, "answers": 3, "samples": 3},
        "checkpoint": {"every": 4},
    }
    (place / "sft.yaml").write_text(yaml.safe_dump(tree))
    return place / "sft.yaml"
