"""Measure data preparation against `tokenizers` alone, and the loader against a training step.

usage: python tools/bench/packing.py RUN [key=value ...] [--megabytes 8] [--rounds 5]
           [--out docs/results/data.json]

Packing reads records, tokenises, packs and writes fsynced, checksummed shards with `data.processes`
threads. It is compared with `encode_batch_fast` and `encode_batch` of `tokenizers` on the same
texts, already in memory, with its own pool of as many threads. The three take turns, so that a busy
machine slows all alike. RUN is a run directory whose data is still there; the length of a training
step is taken from its metrics.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import RESULTS, Table, publish
from tokenizers import Tokenizer

from llmnorm.config.file import load
from llmnorm.data import corpus, packing
from llmnorm.data.loader import Loader
from llmnorm.data.packed import PackedData
from llmnorm.data.settings import SourceSettings
from llmnorm.data.shards import ShardWriter
from llmnorm.data.tokenizer import TextEncoder, cores
from llmnorm.part import InputError


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def some_texts(sources: list[SourceSettings], size: int) -> list[str]:
    """About `size` bytes of documents, the same share of every source."""
    texts = []
    for index, source in enumerate(sources):
        left = size // len(sources)
        for text in corpus.texts(source, f"data.sources.{index}"):
            texts.append(text[:left])
            left -= len(text)
            if left <= 0:
                break
    return texts


def packing_rates(packed: PackedData, texts: list[str], threads: int, rounds: int) -> dict:
    """MB/s of packing and of `tokenizers` alone: medians, ratios and all rounds."""
    encoder = TextEncoder(packed.tokenizer_directory)
    alone = Tokenizer.from_file(str(packed.tokenizer_directory / "tokenizer.json"))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    times: dict[str, list[float]] = {"packing": [], "encode_batch_fast": [], "encode_batch": []}
    with tempfile.TemporaryDirectory() as made:
        records = Path(made) / "texts.jsonl"
        records.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

        def pack(number: int) -> None:
            documents = corpus.texts(SourceSettings(name="texts", path=str(records)), "texts")
            writer = ShardWriter(Path(made) / f"{number}", "train")
            writer.write(encoder.encode(documents, threads))

        for number in range(rounds):
            times["packing"].append(seconds(lambda n=number: pack(n)))  # type: ignore[misc]
            for name in ("encode_batch_fast", "encode_batch"):
                encode = getattr(alone, name)
                times[name].append(seconds(lambda e=encode: e(texts)))  # type: ignore[misc]
    rates = {name: [round(megabytes / t, 3) for t in found] for name, found in times.items()}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "megabytes": round(megabytes, 2),
        "threads": threads,
        "mb_per_second": medians,
        "packing_over_encode_batch_fast": round(
            medians["packing"] / medians["encode_batch_fast"], 3
        ),
        "packing_over_encode_batch": round(medians["packing"] / medians["encode_batch"], 3),
        "rounds": rates,
    }


def loader_cost(packed: PackedData, rows: int, step: float, rounds: int) -> dict:
    """How long a step of `rows` rows waits for the loader; locating rows ahead is included."""
    steps = max(1, 2**14 // rows)
    batches = Loader(packed, seed=0, global_batch=rows).batches()
    next(batches)  # opens the shards
    found = [seconds(lambda: [next(batches) for _ in range(steps)]) / steps for _ in range(rounds)]
    cost = statistics.median(found)
    return {
        "rows_a_step": rows,
        "context_length": packed.context_length,
        "microseconds_a_row": round(cost / rows * 1e6, 2),
        "seconds_a_step": round(cost, 6),
        "step_seconds": round(step, 4),
        "share_of_step": round(cost / step, 5),
    }


def step_seconds(metrics: Path) -> float:
    """The median duration of a training step, evaluation and saving left out."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "tokens_per_second" in line]
    if not trained:
        raise InputError(f"{metrics}: no training step is logged")
    tokens = trained[-1]["tokens"] / trained[-1]["step"]
    return statistics.median(tokens / line["tokens_per_second"] for line in trained)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="Measure packing and loading.")
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "data.json")
    parsed = parser.parse_intermixed_args()
    config = load(parsed.run, parsed.overrides).config
    step = step_seconds(parsed.run / "metrics.jsonl")
    threads = config.data.processes or cores()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the pool of `tokenizers` alone
    packed = packing.prepare(config.data, config.tokenizer)
    texts = some_texts(packing.sources_of(config.data), int(parsed.megabytes * 1e6))
    packing_found = packing_rates(packed, texts, threads, parsed.rounds)
    loading = loader_cost(packed, config.training.rows, step, parsed.rounds)
    rates = packing_found["mb_per_second"]
    tables = [
        Table(
            f"{packing_found['megabytes']} MB of text, {threads} threads",
            ["", "MB/s", "packing over it", "bar"],
            [
                [name, f"{rate:.2f}", f"{rates['packing'] / rate:.2f}", bar]
                for (name, rate), bar in zip(rates.items(), ("", "0.85", "0.85"), strict=True)
            ],
        ),
        Table(
            f"{loading['rows_a_step']} rows of {loading['context_length']} tokens a step",
            ["", "us a row", "share of a step", "bar"],
            [
                [
                    "loader",
                    f"{loading['microseconds_a_row']:.1f}",
                    f"{loading['share_of_step']:.2%}",
                    "1 %",
                ]
            ],
        ),
    ]
    figures = {"packing": packing_found, "loader": loading}
    publish(parsed.out, "Data: packing and loading", tables, figures)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench: error: {error}")
