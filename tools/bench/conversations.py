"""Measure the preparation of conversations against `tokenizers` alone, and the loader of a step.

usage: python tools/bench/conversations.py RUN [key=value ...] [--megabytes 1.5] [--rounds 9]
           [--out docs/results/conversations.json]

Conversations are cut out of the text of RUN's sources, in two shapes, and rendered by ChatML with
RUN's tokenizer. Preparing reads records, checks, renders and encodes them, finds what is trained,
and writes fsynced, checksummed shards. It is compared with `encode_batch_fast` of `tokenizers` on
the same texts, rendered beforehand. The two take turns, so that a busy machine slows both alike.
Both have one thread: rendering is Python's, of which one thread runs at a time.

The loader makes the rows of a step: it lays out examples by best fit, reads them and makes the
tensors. The step is that of tools/bench/lora_step.py, of as many rows.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lora_step
import yaml
from packing import seconds, some_texts
from report import RESULTS, Table, publish
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer

from llmnorm.config.file import load
from llmnorm.data import corpus, packing
from llmnorm.data.chat import ChatTemplate
from llmnorm.data.conversations import Conversations
from llmnorm.data.example_blocks import Encoder
from llmnorm.data.making_conversations import StreamWriter, items
from llmnorm.data.settings import SourceSettings, TokenizerSettings
from llmnorm.data.templates import write_template
from llmnorm.data.tokenizer import TextEncoder, copy
from llmnorm.objectives.sft import SFT
from llmnorm.part import InputError

ROWS, LENGTH, BAR, LOADER_BAR = 8, lora_step.LENGTH, 0.6, 0.01


class Shape(NamedTuple):
    """Lengths of conversations, each drawn between two numbers: characters, and turns."""

    question: tuple[int, int]
    answer: tuple[int, int]
    turns: tuple[int, int]


SHAPES = {
    "usual": Shape((40, 300), (300, 1500), (1, 3)),
    "short turns": Shape((20, 100), (20, 200), (2, 6)),
}


def cut(text: str, shape: Shape) -> list[dict[str, Any]]:
    """Conversations whose messages are consecutive pieces of a text."""
    draw, place, found = random.Random(0), 0, []
    while place < len(text):
        messages = []
        for _ in range(draw.randint(*shape.turns)):
            for role, lengths in (("user", shape.question), ("assistant", shape.answer)):
                size = draw.randint(*lengths)
                messages.append({"role": role, "content": text[place : place + size].strip()})
                place += size
        if all(message["content"] for message in messages):
            found.append({"messages": messages})
    return found


def rates(
    conversations: list[dict[str, Any]], records: Path, tokenizer: Path, rounds: int
) -> dict[str, Any]:
    """MB/s of preparing and of `tokenizers` alone: medians, their ratio and all rounds."""
    other = AutoTokenizer.from_pretrained(tokenizer)
    rendered = [other.apply_chat_template(c["messages"], tokenize=False) for c in conversations]
    megabytes = sum(len(text.encode()) for text in rendered) / 1e6
    alone = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encoder = Encoder(ChatTemplate(tokenizer), TextEncoder(tokenizer), 2048, "truncate")
    source = SourceSettings(name="cut", path=str(records))

    def prepare(number: int) -> None:
        bad = corpus.bad_records(source, "cut")
        bar = tqdm(disable=True)
        write = StreamWriter(records.parent / f"{number}", encoder, 1, bad, bar, "cut")
        write("train", items(source, "cut", bad))

    times: dict[str, list[float]] = {"preparing": [], "tokenizers": []}
    for number in range(rounds + 1):  # the first one compiles the template
        times["preparing"].append(seconds(lambda n=number: prepare(n)))  # type: ignore[misc]
        times["tokenizers"].append(
            seconds(lambda: alone.encode_batch_fast(rendered, add_special_tokens=False))
        )
    pairs = zip(times["preparing"][1:], times["tokenizers"][1:], strict=True)
    ratios = [round(theirs / mine, 3) for mine, theirs in pairs]
    return {
        "conversations": len(conversations),
        "bytes_a_conversation": round(megabytes * 1e6 / len(conversations)),
        "megabytes": round(megabytes, 2),
        "mb_per_second": {
            n: round(megabytes / statistics.median(t[1:]), 3) for n, t in times.items()
        },
        "preparing_over_tokenizers": statistics.median(ratios),
        "rounds": ratios,
    }


def loader_cost(records: Path, tokenizer: Path, step: float, rounds: int) -> dict[str, Any]:
    """How long a step of `ROWS` rows waits for the loader; locating rows ahead is included."""
    tree = {
        "objective": "sft",
        "data": {
            "sources": [{"name": "cut", "path": str(records)}],
            "context_length": LENGTH,
            "dir": str(records.parent / "data"),
        },
        "tokenizer": {"path": str(tokenizer)},
        "training": {"steps": 1, "global_batch": ROWS, "device": "cpu"},
    }
    file = records.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    config = load(file).config
    objective = config.objective.build(config, alone=True, command="")
    assert isinstance(objective, SFT)
    assert isinstance(objective.data, Conversations)
    (source,) = objective.data.sources
    examples = max(1, round(ROWS * LENGTH / (source.tokens / source.examples - 1)))
    batches = objective.batches(0, global_batch=examples, rank=0, world=1, micro_batch=ROWS)
    next(batches)  # opens the shards
    count = max(1, 2**12 // examples)
    found = [seconds(lambda: [*islice(batches, count)]) / count for _ in range(rounds)]
    cost = statistics.median(found)
    return {
        "examples_a_step": examples,
        "seconds_a_step": round(cost, 6),
        "step_seconds": round(step, 4),
        "share_of_step": round(cost / step, 5),
    }


def step_seconds() -> float:
    """The median of three steps of tools/bench/lora_step.py."""
    steps = lora_step.ours(ROWS)
    next(steps)
    return statistics.median(seconds(lambda: next(steps)) for _ in range(3))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--megabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "conversations.json")
    parsed = parser.parse_intermixed_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # the pool of `tokenizers` alone
    config = load(parsed.run, parsed.overrides).config
    packed = packing.prepare(config.data, config.tokenizer)
    text = "\n".join(some_texts(packing.sources_of(config.data), int(parsed.megabytes * 1e6)))
    step = step_seconds()
    prepared, loading = {}, {}
    with tempfile.TemporaryDirectory() as made:
        tokenizer = Path(made) / "tokenizer"
        copy(packed.tokenizer_directory, tokenizer)
        write_template(tokenizer, TokenizerSettings(path=tokenizer, chat_template=Path("chatml")))
        for name, shape in SHAPES.items():
            records = Path(made) / name.replace(" ", "_") / "records.jsonl"
            records.parent.mkdir()
            conversations = cut(text, shape)
            records.write_text("".join(json.dumps(found) + "\n" for found in conversations))
            prepared[name] = rates(conversations, records, tokenizer, parsed.rounds)
            loading[name] = loader_cost(records, tokenizer, step, parsed.rounds)
    publish(
        parsed.out,
        "Conversations: preparing and loading",
        tables(prepared, loading),
        {
            "preparing": prepared,
            "loader": loading,
        },
    )


def tables(prepared: dict[str, Any], loading: dict[str, Any]) -> list[Table]:
    """The tables as they are read."""
    return [
        Table(
            "preparing conversations by ChatML against `tokenizers` alone, one thread each",
            ["", "bytes each", "MB/s", "tokenizers MB/s", "ratio", "bar", ""],
            [
                [
                    name,
                    str(found["bytes_a_conversation"]),
                    *(f"{rate:.2f}" for rate in found["mb_per_second"].values()),
                    f"{found['preparing_over_tokenizers']:.2f}",
                    f"{BAR:.2f}",
                    "holds" if found["preparing_over_tokenizers"] >= BAR else "below",
                ]
                for name, found in prepared.items()
            ],
        ),
        Table(
            f"the loader of a LoRA step of {ROWS} rows of {LENGTH} tokens",
            ["", "examples a step", "ms a step", "share of a step", "bar", ""],
            [
                [
                    name,
                    str(found["examples_a_step"]),
                    f"{found['seconds_a_step'] * 1e3:.2f}",
                    f"{found['share_of_step']:.2%}",
                    f"{LOADER_BAR:.0%}",
                    "holds" if found["share_of_step"] < LOADER_BAR else "below",
                ]
                for name, found in loading.items()
            ],
        ),
    ]


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench: error: {error}")
