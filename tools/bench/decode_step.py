"""Measures a decode step, ours beside Hugging Face's `generate` and llama.cpp, on a CPU.

usage: python tools/bench/decode_step.py [--quick] [--sizes 27M quickstart] [--batches 1 4 8 16]
           [--threads 1 2] [--steps 48] [--rounds 5] [--llama-cpp PYTHON]
           [--out docs/results/decode_step.json]

A step is one more token for each row, greedily, after prompts of 32 tokens; float32, from the same
weights (a Llama), and the tokens are compared. The candidates take turns, a round each:
  generate    LlamaForCausalLM.generate; a step is what each of `steps` more tokens adds
  loop        the same model in a plain loop with its cache
  eager       our Decoder, weights as they are, uncaptured
  laid out    the same, with the weights' layout that the rule picks for this processor
  captured    captured, weights as they are
  ours        what the rule picks: `Decoder(model)`
  llama.cpp   with `--llama-cpp PYTHON`, a Python that has llama-cpp-python: f16 keys, flash
              attention off
A time is the median over the rounds of the mean step, a ratio the median over the rounds of (the
candidate's time / ours in that round). With one thread times are CPU seconds, so that other work on
the machine makes little difference; with more they are by the clock.

Beside them, of ours, in turns too: the time of 5 and 9 tokens a row over that of 1, which are then
rolled back; one client in a cache of 16 rows over one in a cache of 1. Then bf16 weights.
`read once` is the time of reading all weights and the keys and values once, by a sum with the same
threads, and its share of a step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from decode_candidates import (  # noqa: E402
    PROMPT,
    SIZES,
    VOCABULARY,
    Clock,
    LlamaCpp,
    Measured,
    generated,
    looped,
    models,
    our_steps,
    over_a_step,
    read_once,
    write_gguf,
)
from report import RESULTS, Table, publish  # noqa: E402
from tqdm import tqdm  # noqa: E402

from llmnorm.models.decoding import Decoder  # noqa: E402

SLOTS = 16
WIDTHS = (5, 9)  # tokens a row of a verification


def measured(
    size: str, threads: int, options: argparse.Namespace, bar: Any
) -> list[dict[str, Any]]:
    """The figures of a size with so many threads, one entry a batch."""
    torch.set_num_threads(threads)
    clock = Clock(threads)
    ours, theirs = models(SIZES[size])
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        3, VOCABULARY, (max(*options.batches, SLOTS), PROMPT), generator=generator
    )
    decoder = Decoder(ours)
    half = Decoder(models(SIZES[size])[0].bfloat16())
    decoders = {
        "eager": Decoder(ours, captured=False, layout="plain"),
        "laid out": Decoder(ours, captured=False),
        "captured": Decoder(ours, layout="plain"),
        "ours": decoder,
    }
    peer = None
    found = []
    with tempfile.TemporaryDirectory() as directory:
        if options.llama_cpp:
            file, listed = Path(directory, "m.gguf"), Path(directory, "prompts.json")
            write_gguf(theirs, file)
            listed.write_text(json.dumps(prompts.tolist()), encoding="utf-8")
            peer = LlamaCpp(options.llama_cpp, file, threads, options.steps, listed, clock)
        for rows in options.batches:
            ids = prompts[:rows]
            more = options.steps, clock
            candidates: dict[str, Callable[[], Measured]] = {
                "generate": partial(generated, theirs, ids, *more),
                "loop": partial(looped, theirs, ids, *more),
            }
            for name, some in decoders.items():
                candidates[name] = partial(our_steps, some, ours, ids, *more)
            if peer is not None:
                candidates["llama.cpp"] = partial(peer.run, rows)
            times: dict[str, list[float]] = {name: [] for name in candidates}
            tokens: dict[str, list[list[int]]] = {}
            for turn in range(options.rounds + 1):
                for name, run in candidates.items():
                    seconds, tokens[name] = run()
                    bar.update()
                    if turn:  # the first warms up, and traces
                        times[name].append(seconds)
            entry: dict[str, Any] = {
                "size": size,
                "threads": threads,
                "batch": rows,
                "clock": clock.key,
                "milliseconds": {n: 1e3 * statistics.median(t) for n, t in times.items()},
                "over ours": {
                    n: statistics.median(a / b for a, b in zip(t, times["ours"], strict=True))
                    for n, t in times.items()
                },
                "equal tokens": {n: _share(t, tokens["generate"]) for n, t in tokens.items()},
            }
            once = read_once(ours, rows, PROMPT + options.steps // 2, clock)
            entry["read once"] = 1e3 * once
            passes = [(new, rows) for new in WIDTHS] + ([(1, SLOTS)] if rows == 1 else [])
            ratios = over_a_step(decoder, ours, ids, passes, clock)
            entry["more tokens"] = dict(zip(WIDTHS, ratios, strict=False))
            if rows == 1:
                entry["one of 16"] = ratios[-1]
            entry["bf16"] = 1e3 * statistics.median(
                our_steps(half, ours, ids, options.steps, clock)[0] for _ in range(3)
            )
            found.append(entry)
    if peer is not None:
        peer.close()
    return found + [{"says": decoder.says}]


def _share(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """The share of rows whose tokens are all those of the reference."""
    columns = zip(zip(*tokens, strict=True), zip(*reference, strict=True), strict=True)
    return statistics.mean(a == b for a, b in columns)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small size, one round, no file")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.batches, options.threads = ["quickstart"], [1, 2], [1]
        options.steps, options.rounds = 3, 1
    elif options.out is None:
        options.out = RESULTS / "decode_step.json"
    entries: list[dict[str, Any]] = []
    turns = len(options.sizes) * len(options.threads) * len(options.batches)
    candidates = 6 + bool(options.llama_cpp)
    before = torch.get_num_threads()
    with tqdm(total=turns * (options.rounds + 1) * candidates) as bar:
        for size in options.sizes:
            for threads in options.threads:
                entries += measured(size, threads, options, bar)
    torch.set_num_threads(before)
    says = sorted({entry.pop("says") for entry in entries if "says" in entry})
    entries = [entry for entry in entries if entry]
    publish(
        options.out,
        "A decode step (CPU, float32)",
        tables(entries),
        {"entries": entries, "says": says},
    )
    print("\n".join(says))
    return 0


def tables(entries: list[dict[str, Any]]) -> list[Table]:
    """A table a size and number of threads, and one of what else was measured of ours."""
    found = []
    for size, threads in dict.fromkeys((e["size"], e["threads"]) for e in entries):
        some = [e for e in entries if (e["size"], e["threads"]) == (size, threads)]
        rows = [
            [name, *(f"{e['milliseconds'][name]:.2f} ({e['over ours'][name]:.2f}x)" for e in some)]
            for name in some[0]["milliseconds"]
        ]
        rows.append(
            [
                "read once",
                *(
                    f"{e['read once']:.2f} ({e['read once'] / e['milliseconds']['ours']:.0%})"
                    for e in some
                ),
            ]
        )
        kind = "CPU" if threads == 1 else "wall clock"
        title = (
            f"{size}, {threads} thread(s): {kind} ms a step by rows (time over ours; of `read "
            "once`, its share of our step)"
        )
        found.append(Table(title, ["", *(str(e["batch"]) for e in some)], rows))
    rows = [
        [
            f"{e['size']}, {e['threads']} thread(s), {e['batch']} rows",
            *(f"{e['more tokens'][new]:.2f}" for new in WIDTHS),
            f"{e['one of 16']:.2f}" if "one of 16" in e else "",
            f"{e['bf16']:.2f}",
            f"{min(e['equal tokens'].values()):.0%}",
        ]
        for e in entries
    ]
    columns = [
        "",
        "5 tokens over 1",
        "9 over 1",
        "one of 16 slots over one of 1",
        "bf16, ms",
        "rows with equal tokens in all",
    ]
    return [*found, Table("ours, beside that", columns, rows)]


if __name__ == "__main__":
    sys.exit(main())
